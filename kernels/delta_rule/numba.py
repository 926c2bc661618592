"""The delta rule as loops compiled for a CPU."""

from kernels.common.numba_matrix import backward, forward

__all__ = ["backward", "forward"]
