"""Linear attention and the delta rule on a CPU as compiled loops: a matrix per sequence and head, token by token.

    S' = keep_t S_{t-1};  S_t = S' + w_t k_t^T,  w_t = v_t or beta_t (v_t - S' k_t);  o_t = scale S_t q_t

and back, with U_t the adjoint of S_t: U_t = keep_{t+1} U'_{t+1} + scale do_t q_t^T; dw = U k; dk = U^T w; of the error
in the delta rule dv = beta dw, and through its S' k, U' = U - dv k^T and dk = U^T w - S'^T dv; the gradient of a log
decay is the sum of U' S' over its channel: every one a sum over tokens that is taken as such, so that no decay is
divided by. For narrow heads, whose products in chunks are many small calls of torch with as many passes between them.

Legend: S sequences, R tokens, H heads, K and V widths, N kept states: [N, H, K, V], one before every chunk.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.numba import array, places, spread
from kernels.common.numba_matrix_loops import loops
from kernels.common.numba_vectors import filled
from kernels.common.varlen import num_chunks


class _Call:
    """What both passes of one call read, as arrays in the order of the loops' arguments."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        g: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        chunk: int,
        normalize: bool,
    ):
        batch, length, heads, width = q.shape
        self.dtype = state_dtype(v.dtype)
        firsts, lengths, _ = places(batch, length, None, cu_seqlens)
        chunks = torch.div(lengths + chunk - 1, chunk, rounding_mode="floor")
        self.sequences, self.rows = len(firsts), num_chunks(batch, length, chunk, cu_seqlens)
        self.lanes, self.work = self.sequences * heads, q.numel() * v.shape[3]
        self.filled = int(chunks.sum())
        self.loops = loops(*(filled(size, self.dtype.itemsize) for size in (width, v.shape[3])), beta is not None)
        self.gates = 0 if g is None else 1 if g.dim() == 3 else width
        decay = self.new(0) if g is None else g.to(self.dtype).contiguous().exp()
        decay = decay.view(batch * length, heads, self.gates)
        numbers = [x.to(self.dtype).flatten(0, 1) for x in (q, k, v, self.new(0, 0, 0) if beta is None else beta)]
        where = (*map(array, (firsts, lengths, chunks.cumsum(0) - chunks)), chunk)
        size = array(torch.tensor(scale, dtype=self.dtype))[()]
        self.arguments = (where, size, normalize, *map(array, (*numbers, decay)))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def run(self, loop: Any, *arrays: Tensor) -> None:
        spread(loop, self.lanes, self.work, *self.arguments, *map(array, arrays))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, T, H, V], the last states [S, H, K, V] and, if `save`, the kept ones."""
    call = _Call(q, k, v, beta, g, cu_seqlens, scale, chunk, normalize)
    shape = (q.shape[2], q.shape[3], v.shape[3])
    start = torch.zeros(call.sequences, *shape, dtype=call.dtype) if h0 is None else h0.to(call.dtype)
    out, final = call.new(v.shape[0] * v.shape[1], *v.shape[2:]), call.new(call.sequences, *shape)
    kept = call.new(call.rows if save else 0, *shape)
    # of packed sequences there may be fewer
    kept[call.filled :] = 0
    call.run(call.loops[0], start, out, final, kept)
    return out.view(v.shape).to(v.dtype), final, kept


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    normalize: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g and of the initial state [S, H, K, V]."""
    call = _Call(q, k, v, beta, g, cu_seqlens, scale, chunk, normalize)
    heads, tokens = q.shape[2], q.shape[0] * q.shape[1]
    dq, dk, dv = (call.new(tokens, *x.shape[2:]) for x in (q, k, v))
    dbeta, dg, dstart = call.new(tokens, heads), call.new(tokens, heads, call.gates), call.new(*dfinal.shape)
    given = (kept, do.to(call.dtype).flatten(0, 1), dfinal.to(call.dtype))
    call.run(call.loops[1], *given, dq, dk, dv, dbeta, dg, dstart)
    found = zip((q, k, v, beta, g), (dq, dk, dv, dbeta, dg), strict=True)
    return *(None if x is None else dx.view(x.shape).to(x.dtype) for x, dx in found), dstart
