"""(I + A)^-1 of every chunk of the delta rule in Triton, and what its forward and backward share.

Built by halves of halves in float32, T <- T - T A_square T, which is forward substitution in blocks (squaring A loses
everything on correlated keys). Inverse [R, H, C, C].
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, pow2, row
from kernels.common.triton_chunks import KEY, tiles
from kernels.common.triton_device import (
    channel_scores,
    chunk_bounds,
    decay_mask,
    level_map,
    load_gate,
    load_tile,
    load_unit,
    row_scale,
)
from kernels.common.triton_packed import Packed


@triton.jit
def load_square(ptr, line, h, H, C: tl.constexpr):
    """The inverse of chunk `line`, head h."""
    i = tl.arange(0, C)
    return tl.load(ptr + (line.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :])


@triton.jit
def invert(a, LEVELS: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """(I + A)^-1 of a strictly lower A by halves of halves: T <- T - T A_square T."""
    i = tl.arange(0, C)
    inverse = (i[:, None] == i[None, :]).to(tl.float32)
    width = 1
    for _ in range(LEVELS):
        second, block, _interval = level_map(width, C)
        square = (block[:, None] == block[None, :]) & second[:, None] & (second[None, :] == 0)
        below = tl.dot(inverse, tl.where(square, a, 0.0), input_precision=PREC)
        inverse -= tl.dot(below, inverse, input_precision=PREC)
        width *= 2
    return inverse


@triton.jit
def _chunk_inverses(
    k_ptr,
    beta_ptr,
    g_ptr,
    cu_ptr,
    first_ptr,
    seq_ptr,
    inverse_ptr,
    S,
    H,
    K,
    V,
    HAS_GATE: tl.constexpr,
    CHANNEL: tl.constexpr,
    LEVELS: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORM: tl.constexpr,
):
    """(I + A)^-1 of one chunk, A[i, j] = beta_i <k_i, k_j> decayed, j < i."""
    line, h = tl.program_id(0), tl.program_id(1)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0, end = chunk_bounds(line, s, cu_ptr, first_ptr, C)
    rk = row_scale(k_ptr, t0, end, h, H, K, NORM, C, BK)
    a = tl.zeros([C, C], tl.float32)
    for k0 in range(0, K, BK):
        k = load_unit(k_ptr, rk, t0, end, h, H, K, k0, NORM, C, BK)
        if CHANNEL:
            g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
            a += channel_scores(k, k, g, True, LEVELS, C, PREC)
        else:
            a += tl.dot(k, tl.trans(k), input_precision=PREC)
    if not CHANNEL:
        a *= decay_mask(load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, CHANNEL, C, BK), True, C)
    a *= load_tile(beta_ptr, t0, end, h, H, 1, 0, C, 1).to(tl.float32)
    inverse = invert(a, LEVELS, C, PREC)
    i = tl.arange(0, C)
    tl.store(inverse_ptr + (line.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :], inverse)


def walk_rows(args: dict[str, Any]) -> list[Row]:
    """The walk needs all of K on chip, so a wide K gets a narrow tile of V."""
    bk = pow2(args["K"])
    bv = min(pow2(args["V"]), 32 if bk <= 64 else 16)
    crowded = args["CHANNEL"] or (bk > 64 and args["k_ptr"].dtype == torch.float32)
    return [row(BK=bk, BV=bv, warps=w, stages=1) for w in ((8, 4) if crowded else (4, 8))]


_INVERSES = Kernel(_chunk_inverses, tiles, KEY)


def inverses(call: Packed, kp: Tensor, bp: Tensor, normalize: bool) -> Tensor:
    """Launch: the inverses of all chunks [R, H, C, C]."""
    chunk = call.chunk["C"]
    inverse = torch.empty(call.rows, call.heads, chunk, chunk, dtype=torch.float32, device=call.device)
    _INVERSES.launch(
        lambda meta: (call.rows, call.heads),
        **call.chunk,
        k_ptr=kp,
        beta_ptr=bp,
        inverse_ptr=inverse,
        NORM=normalize,
    )
    return inverse
