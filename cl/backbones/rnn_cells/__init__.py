"""Cells of the mixer nonlinear_rnn, one a file."""
