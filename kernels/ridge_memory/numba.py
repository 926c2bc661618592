"""The solves of ridge memory on a CPU as compiled loops: every sequence and head walks through its tokens alone.

H_t is there as a matrix, so a step of a solve is a product with K^2 numbers; in chunks it is two products with more.

The gradient is that of `implicit`, token by token. Let z_t solve the system of token t for the incoming gradient dx_t.
A change of H_t and lambda_t changes x_t by -(H_t + lambda_t I)^-1 (dH_t + dlambda_t I) x_t, and the loss by
-z_t^T dH_t x_t - (z_t . x_t) dlambda_t, where dlambda_t = ratio <H_t, dH_t> / |H_t|. With a_t = exp(g_t) and
H_t = a_t H_{t-1} + beta_t k_t k_t^T, which is symmetric, the whole gradient with respect to H_t is

    G_t = a_{t+1} G_{t+1} - (z_t x_t^T + x_t z_t^T) / 2 - (z_t . x_t) ratio H_t / |H_t|

from the gradient of the last state on, and dq_t = z_t, dk_t = 2 beta_t G_t k_t, dbeta_t = k_t^T G_t k_t,
dg_t = a_t <G_t, H_{t-1}>, and a_1 G_1 for the initial state. Where |H_t| = 0 the last term is none.
A state per chunk is kept; the backward makes those in between again.

Legend: as in `numba_loops`.
"""

import torch
from torch import Tensor

from kernels.common.numba import array, places, spread
from kernels.common.numba_vectors import filled
from kernels.common.varlen import num_chunks
from kernels.ridge_memory.numba_loops import loops


class _Call:
    """What both passes of one call read, as arrays in the order of the loops' arguments."""

    def __init__(
        self,
        k: Tensor,
        beta: Tensor | None,
        g: Tensor | None,
        cu_seqlens: Tensor | None,
        ratio: float,
        floor: float,
        steps: int,
        chunk: int,
    ):
        batch, length, heads, width = k.shape
        firsts, lengths, _ = places(batch, length, None, cu_seqlens)
        pieces = (lengths + chunk - 1) // chunk
        self.loops = loops(filled(width, k.element_size()), k.element_size())
        self.lanes, self.work = len(lengths) * heads, batch * length * heads * width**2 * steps
        ones = k.new_ones(batch * length, heads)
        weight = ones if beta is None else beta.flatten(0, 1)
        decay = ones if g is None else g.flatten(0, 1).exp()
        # in the width of the others
        bounds = (array(k.new_tensor(x))[()] for x in (ratio, floor))
        where = (*map(array, (firsts, lengths, pieces.cumsum(0) - pieces)), chunk)
        self.arguments = (where, tuple(map(array, (k.flatten(0, 1), weight, decay))), (*bounds, steps))


def forward(
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [B, T, H, K], the last H [S, H, K, K] and the kept chunk states (empty unless `save`)."""
    call = _Call(k, beta, g, cu_seqlens, ratio, floor, steps, chunk)
    x, final = torch.empty_like(q, memory_format=torch.contiguous_format), h0.new_empty(h0.shape)
    # rows of an empty sequence are read by nobody, and never written
    kept = h0.new_zeros(num_chunks(q.shape[0], q.shape[1], chunk, cu_seqlens) if save else 0, *h0.shape[1:])
    given = (q.flatten(0, 1), h0, kept, x.flatten(0, 1), final)
    spread(call.loops[0], call.lanes, call.work, *call.arguments, *map(array, given))
    return x, final, kept


def backward(
    dx: Tensor,
    dfinal: Tensor,
    x: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, beta, g and h0."""
    call = _Call(k, beta, g, cu_seqlens, ratio, floor, steps, chunk)
    dq, dk, dbeta, dg = (k.new_empty(shape) for shape in (k.shape, k.shape, k.shape[:3], k.shape[:3]))
    dstart = dfinal.new_empty(dfinal.shape)
    given = (x.flatten(0, 1), kept, dx.flatten(0, 1), (dfinal + dfinal.mT) / 2)
    found = (*(each.flatten(0, 1) for each in (dq, dk, dbeta, dg)), dstart)
    spread(call.loops[1], call.lanes, call.work, *call.arguments, *map(array, (*given, *found)))
    return dq, dk, None if beta is None else dbeta, None if g is None else dg, dstart
