"""What every op shares: the choice of a backend, packed sequences, chunk algebra, argument checks."""

from kernels.common.dispatch import BACKENDS, Decision, explain
from kernels.common.varlen import cu_seqlens_from_reset

__all__ = ["BACKENDS", "Decision", "cu_seqlens_from_reset", "explain"]
