"""Gated linear attention as loops compiled for a CPU: the delta rule without its error."""

from torch import Tensor

from kernels.common import numba_matrix


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, T, H, V], the last states [S, H, K, V] and, if `save`, the chunk states [R, H, K, V]."""
    return numba_matrix.forward(q, k, v, None, g, h0, cu_seqlens, scale, chunk, False, save)


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g and of the initial state [S, H, K, V]."""
    given = (do, dfinal, q, k, v, None, g, states, cu_seqlens, scale, chunk, False)
    dq, dk, dv, _, dg, dh0 = numba_matrix.backward(*given)
    return dq, dk, dv, dg, dh0
