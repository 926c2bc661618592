"""Synthetic streams that show what a network with memory remembers, overwrites, selects and tracks."""
