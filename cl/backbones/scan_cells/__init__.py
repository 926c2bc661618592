"""Cells of the mixer scan_rnn, one a file."""
