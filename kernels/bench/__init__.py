"""Verify, then measure: one command on CPU and GPU (see `python -m kernels.bench --help`)."""
