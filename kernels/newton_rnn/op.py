"""The ops that torch knows of Newton's RNN: shapes without values, and the gradient.

Legend: states [B, T, N] with a diagonal, [B, T, H, D] with a matrix per head; gate inputs with 3 before the units.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import cotangents, state_dtype
from kernels.common.dispatch import without_autocast
from kernels.common.varlen import num_chunks
from kernels.newton_rnn import chunked


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return chunked
    from kernels.newton_rnn import triton

    return triton


@torch.library.custom_op("cl_kernels::newton_rnn", mutates_args=())
@without_autocast
def solved(
    x: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    chunk: int,
    block: int,
    tolerance: float,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return h, what the backward is spared of computing again, the last states, corrections and residuals."""
    h, aside, final, counts, residual = _engine(backend).forward(
        x, r, peephole, h0, reset, cu_seqlens, cell, chunk, block, tolerance, most
    )
    return h, aside, final, counts, residual


@solved.register_fake
def _(
    x: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    chunk: int,
    block: int,
    tolerance: float,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = state_dtype(x.dtype)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # the chunked backend solves the whole batch together, Triton every sequence by itself
    rows = num_chunks(1 if backend == "chunked" else x.shape[0], x.shape[1], block or x.shape[1], None)
    if backend == "triton" and cu_seqlens is not None:
        rows = num_chunks(1, x.shape[1], block, cu_seqlens)
    h = x.new_empty(*x.shape[:2], *x.shape[3:], dtype=dtype)
    # c, or the candidates of the GRU: on a CPU the backward is spared a tanh, a card computes them again
    aside = x.new_empty(h.shape if cell == "lstm" or backend == "chunked" else (0,), dtype=dtype)
    final = x.new_empty(sequences, 2 if cell == "lstm" else 1, *x.shape[3:], dtype=dtype)
    return h, aside, final, x.new_empty(rows, dtype=torch.int32), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("cl_kernels::newton_rnn_backward", mutates_args=())
@without_autocast
def _backward(
    dh: Tensor,
    dfinal: Tensor,
    x: Tensor,
    r: Tensor,
    peephole: Tensor | None,
    h0: Tensor | None,
    h: Tensor,
    aside: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    chunk: int,
    block: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dr, dpeephole, dh0 = _engine(backend).backward(
        dh, dfinal, x, r, peephole, h0, h, aside, reset, cu_seqlens, cell, chunk, block
    )
    return dx, dr, r.new_empty(0) if dpeephole is None else dpeephole, dh0


@_backward.register_fake
def _(
    dh: Tensor, dfinal: Tensor, x: Tensor, r: Tensor, peephole: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dpeephole = r.new_empty(0) if peephole is None else peephole.new_empty(peephole.shape)
    return x.new_empty(x.shape), r.new_empty(r.shape), dpeephole, dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, r, peephole, h0, reset, cu_seqlens, ctx.cell, ctx.chunk, ctx.block, _, _, ctx.backend = inputs
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, r, peephole, h0, reset, cu_seqlens, *output[:3])


def _differentiate(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    x, r, peephole, h0, reset, cu_seqlens, h, aside, final = ctx.saved_tensors
    dh, dfinal = cotangents((given[0], h), (given[2], final))
    dx, dr, dpeephole, dh0 = _backward(
        dh, dfinal, x, r, peephole, h0, h, aside, reset, cu_seqlens, ctx.cell, ctx.chunk, ctx.block, ctx.backend
    )
    start = None if h0 is None else dh0.to(h0.dtype)
    return dx, dr, None if peephole is None else dpeephole, start, *[None] * 8


solved.register_autograd(_differentiate, setup_context=_save)
