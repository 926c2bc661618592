"""Ahead-of-time compilation: what the compiler makes of every kernel, on machines without a card."""
