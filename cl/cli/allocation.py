"""Let the C library keep what a step frees: the next one asks for the same blocks, and fresh pages cost faults."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
LARGEST_KEPT = 32 * 2**20
"""Bytes of a block that the heap may hold; glibc takes no higher threshold. Larger blocks stay maps of their own."""
KEPT = 2**30
"""Bytes of free memory at the end of the heap that are not given back."""


def keep_freed_memory() -> None:
    """For the whole process, so only a command calls it; with glibc alone, and unless MALLOC_* variables say otherwise.

    On one thread, with batches whose activations take megabytes, a step of training spends up to a fifth of its time in
    page faults otherwise.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return  # another C library
    mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(TRIM_THRESHOLD, KEPT)
