"""The delta rule in Triton: inverse of every chunk's triangle, one walk over the states, outputs. Three launches.

(I + A)^-1 is built by halves of halves in float32, T <- T - T A_square T, which is forward substitution in blocks
(squaring A loses everything on correlated keys). The walk solves for the corrections with it; outputs and key
gradients are those of gated linear attention with the corrections in the place of v. Four launches backward.

Legend: as in kernels.common.triton_chunks; inverse [R, H, C, C]; tensors named *_THV are float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import (
    Kernel,
    Row,
    channel_scores,
    decay_mask,
    level_map,
    load_gate,
    load_state,
    load_tile,
    pow2,
    row,
    store_state,
    store_tile,
)
from kernels.common.triton_chunks import KEY, OUTPUTS, Packed, key_gradients, tiles


@triton.jit
def _load_square(ptr, line, h, H, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(ptr + (line.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :])


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
):
    """(I + A)^-1 of one chunk, A[i, j] = beta_i <k_i, k_j> decayed, j < i."""
    line, h = tl.program_id(0), tl.program_id(1)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0 = tl.load(cu_ptr + s) + (line - tl.load(first_ptr + s)) * C
    end = tl.minimum(t0 + C, tl.load(cu_ptr + s + 1))
    a = tl.zeros([C, C], tl.float32)
    for k0 in range(0, K, BK):
        k = load_tile(k_ptr, t0, end, h, H, K, k0, C, BK)
        if CHANNEL:
            g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
            a += channel_scores(k, k, g, True, LEVELS, C, PREC)
        else:
            a += tl.dot(k, tl.trans(k), input_precision=PREC)
    if not CHANNEL:
        a *= decay_mask(load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, CHANNEL, C, BK), True, C)
    a *= load_tile(beta_ptr, t0, end, h, H, 1, 0, C, 1).to(tl.float32)
    i = tl.arange(0, C)
    inverse = (i[:, None] == i[None, :]).to(tl.float32)
    width = 1
    for _ in range(LEVELS):
        second, block, _interval = level_map(width, C)
        square = (block[:, None] == block[None, :]) & second[:, None] & (second[None, :] == 0)
        below = tl.dot(inverse, tl.where(square, a, 0.0), input_precision=PREC)
        inverse -= tl.dot(below, inverse, input_precision=PREC)
        width *= 2
    tl.store(inverse_ptr + (line.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :], inverse)


@triton.jit
def _walk_corrections(
    k_ptr,
    v_ptr,
    beta_ptr,
    g_ptr,
    inverse_ptr,
    h0_ptr,
    cu_ptr,
    first_ptr,
    states_ptr,
    final_ptr,
    d_ptr,
    H,
    K,
    V,
    HAS_START: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CHANNEL: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """States at chunk starts, the last one, and the corrections d = (I + A)^-1 beta (v - k_in S)."""
    v0 = tl.program_id(1) * BV
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        state += load_state(h0_ptr, s, h, H, K, V, 0, v0, BK, BV)
    for t0 in range(bos, eos, C):
        store_state(states_ptr, state, line, h, H, K, V, 0, v0, BK, BV)
        k = load_tile(k_ptr, t0, eos, h, H, K, 0, C, BK)
        v = load_tile(v_ptr, t0, eos, h, H, V, v0, C, BV).to(tl.float32)
        beta = load_tile(beta_ptr, t0, eos, h, H, 1, 0, C, 1).to(tl.float32)
        g = load_gate(g_ptr, t0, eos, h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        after = load_gate(g_ptr, t0 + 1, tl.minimum(t0 + C, eos), h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        k_in = (k * tl.exp(tl.cumsum(g, 0))).to(k.dtype)
        k_out = (k * tl.exp(tl.cumsum(after, 0, reverse=True))).to(k.dtype)
        error = beta * (v - tl.dot(k_in, state.to(k.dtype), input_precision=PREC))
        d = tl.dot(_load_square(inverse_ptr, line, h, H, C), error, input_precision=PREC)
        store_tile(d_ptr, d, t0, eos, h, H, V, v0, C, BV)
        state = state * tl.exp(tl.sum(g, 0))[:, None]
        state += tl.dot(tl.trans(k_out), d.to(k.dtype), input_precision=PREC)
        line += 1
    store_state(final_ptr, state, s, h, H, K, V, 0, v0, BK, BV)


@triton.jit
def _chunk_corrections(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    beta_ptr,
    g_ptr,
    inverse_ptr,
    states_ptr,
    cu_ptr,
    first_ptr,
    seq_ptr,
    error_ptr,
    d_ptr,
    dd_ptr,
    scale,
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
):
    """For the backward, from the kept states: error = v - k_in S, d, and the outputs' part of dd = scale * P^T do."""
    line, v0, h = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0 = tl.load(cu_ptr + s) + (line - tl.load(first_ptr + s)) * C
    end = tl.minimum(t0 + C, tl.load(cu_ptr + s + 1))
    p = tl.zeros([C, C], tl.float32)
    error = load_tile(v_ptr, t0, end, h, H, V, v0, C, BV).to(tl.float32)
    for k0 in range(0, K, BK):
        q = load_tile(q_ptr, t0, end, h, H, K, k0, C, BK)
        k = load_tile(k_ptr, t0, end, h, H, K, k0, C, BK)
        g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
        if CHANNEL:
            p += channel_scores(q, k, g, False, LEVELS, C, PREC)
        else:
            p += tl.dot(q, tl.trans(k), input_precision=PREC)
        state = load_state(states_ptr, line, h, H, K, V, k0, v0, BK, BV).to(k.dtype)
        error -= tl.dot((k * tl.exp(tl.cumsum(g, 0))).to(k.dtype), state, input_precision=PREC)
    if not CHANNEL:
        p *= decay_mask(load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, CHANNEL, C, BK), False, C)
    beta = load_tile(beta_ptr, t0, end, h, H, 1, 0, C, 1).to(tl.float32)
    d = tl.dot(_load_square(inverse_ptr, line, h, H, C), beta * error, input_precision=PREC)
    do = load_tile(do_ptr, t0, end, h, H, V, v0, C, BV)
    dd = tl.dot(tl.trans((p * scale).to(do.dtype)), do, input_precision=PREC)
    store_tile(error_ptr, error, t0, end, h, H, V, v0, C, BV)
    store_tile(d_ptr, d, t0, end, h, H, V, v0, C, BV)
    store_tile(dd_ptr, dd, t0, end, h, H, V, v0, C, BV)


@triton.jit
def _walk_correction_gradients(
    q_ptr,
    k_ptr,
    do_ptr,
    beta_ptr,
    g_ptr,
    inverse_ptr,
    error_ptr,
    dd_ptr,
    dfinal_ptr,
    cu_ptr,
    first_ptr,
    dstates_ptr,
    dh0_ptr,
    r_ptr,
    dv_ptr,
    dbeta_ptr,
    scale,
    TOKENS,
    H,
    K,
    V,
    HAS_GATE: tl.constexpr,
    CHANNEL: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Last chunk first: dd += k_out dS, r = (I + A)^-T dd, dv = beta r, then dS of the chunk before.

    dbeta gets one partial sum <r, error> per tile of V [V tiles, T, H].
    """
    tile = tl.program_id(1)
    v0 = tile * BV
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    chunks = (eos - bos + C - 1) // C
    i = tl.arange(0, C)
    ds = load_state(dfinal_ptr, s, h, H, K, V, 0, v0, BK, BV)
    for back in range(0, chunks):
        c = chunks - 1 - back
        t0 = bos + c * C
        store_state(dstates_ptr, ds, line + c, h, H, K, V, 0, v0, BK, BV)
        q = load_tile(q_ptr, t0, eos, h, H, K, 0, C, BK)
        k = load_tile(k_ptr, t0, eos, h, H, K, 0, C, BK)
        do = load_tile(do_ptr, t0, eos, h, H, V, v0, C, BV)
        beta = load_tile(beta_ptr, t0, eos, h, H, 1, 0, C, 1).to(tl.float32)
        g = load_gate(g_ptr, t0, eos, h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        after = load_gate(g_ptr, t0 + 1, tl.minimum(t0 + C, eos), h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        into = tl.exp(tl.cumsum(g, 0))
        k_out = (k * tl.exp(tl.cumsum(after, 0, reverse=True))).to(k.dtype)
        dd = load_tile(dd_ptr, t0, eos, h, H, V, v0, C, BV)
        dd += tl.dot(k_out, ds.to(k.dtype), input_precision=PREC)
        r = tl.dot(tl.trans(_load_square(inverse_ptr, line + c, h, H, C)), dd, input_precision=PREC)
        store_tile(r_ptr, r, t0, eos, h, H, V, v0, C, BV)
        partial = tl.sum(r * load_tile(error_ptr, t0, eos, h, H, V, v0, C, BV), 1)
        tl.store(dbeta_ptr + (tile.to(tl.int64) * TOKENS + t0 + i) * H + h, partial, mask=t0 + i < eos)
        r *= beta
        store_tile(dv_ptr, r, t0, eos, h, H, V, v0, C, BV)
        ds = ds * tl.exp(tl.sum(g, 0))[:, None]
        ds += tl.dot(tl.trans((q * into * scale).to(q.dtype)), do, input_precision=PREC)
        ds -= tl.dot(tl.trans((k * into).to(k.dtype)), r.to(k.dtype), input_precision=PREC)
    store_state(dh0_ptr, ds, s, h, H, K, V, 0, v0, BK, BV)


def _walk_rows(args: dict[str, Any]) -> list[Row]:
    """The walk needs all of K on chip, so a wide K gets a narrow tile of V."""
    bk = pow2(args["K"])
    bv = min(pow2(args["V"]), 32 if bk <= 64 else 16)
    crowded = args["CHANNEL"] or (bk > 64 and args["k_ptr"].dtype == torch.float32)
    return [row(BK=bk, BV=bv, warps=w, stages=1) for w in ((8, 4) if crowded else (4, 8))]


_INVERSES = Kernel(_chunk_inverses, tiles, KEY)
_WALK = Kernel(_walk_corrections, _walk_rows, KEY)
_CORRECTIONS = Kernel(_chunk_corrections, tiles, KEY)
_WALK_BACK = Kernel(_walk_correction_gradients, _walk_rows, KEY)


def _inverses(call: Packed, kp: Tensor, bp: Tensor) -> Tensor:
    chunk = call.chunk["C"]
    inverse = torch.empty(call.rows, call.heads, chunk, chunk, dtype=torch.float32, device=call.device)
    _INVERSES.launch(lambda meta: (call.rows, call.heads), **call.chunk, k_ptr=kp, beta_ptr=bp, inverse_ptr=inverse)
    return inverse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.forward`."""
    call = Packed([q, k, v, beta], g, cu_seqlens, v.shape[3], chunk)
    qp, kp, vp, bp = call.tokens
    states, final = call.states(call.rows), call.states(call.sequences)
    start = None if h0 is None else h0.float().contiguous()
    d_THV = torch.empty_like(vp)
    _WALK.launch(
        call.walk_grid,
        **call.walk,
        k_ptr=kp,
        v_ptr=vp,
        beta_ptr=bp,
        inverse_ptr=_inverses(call, kp, bp),
        h0_ptr=final if start is None else start,
        states_ptr=states,
        final_ptr=final,
        d_ptr=d_THV,
        HAS_START=start is not None,
    )
    out = torch.empty_like(vp)
    OUTPUTS.launch(
        call.value_grid, **call.chunk, q_ptr=qp, k_ptr=kp, v_ptr=d_THV, states_ptr=states, o_ptr=out, scale=scale
    )
    return out.view(v.shape).to(v.dtype), final, states if save else states.new_empty(0)


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor | None, ...]:
    """As `chunked.backward`."""
    call = Packed([q, k, v, beta, do.to(v.dtype)], g, cu_seqlens, v.shape[3], chunk)
    qp, kp, vp, bp, dop = call.tokens
    inverse = _inverses(call, kp, bp)
    error_THV, d_THV, dd_THV, r_THV = (torch.empty_like(vp, dtype=torch.float32) for _ in range(4))
    _CORRECTIONS.launch(
        call.value_grid,
        **call.chunk,
        q_ptr=qp,
        k_ptr=kp,
        v_ptr=vp,
        do_ptr=dop,
        beta_ptr=bp,
        inverse_ptr=inverse,
        states_ptr=states,
        error_ptr=error_THV,
        d_ptr=d_THV,
        dd_ptr=dd_THV,
        scale=scale,
    )
    dstates, dh0, dv = call.states(call.rows), call.states(call.sequences), torch.empty_like(vp)
    tiles_v = -(-call.width_v // 16)
    dbeta = vp.new_zeros(tiles_v, call.total, call.heads, dtype=torch.float32)
    _WALK_BACK.launch(
        call.walk_grid,
        **call.walk,
        q_ptr=qp,
        k_ptr=kp,
        do_ptr=dop,
        beta_ptr=bp,
        inverse_ptr=inverse,
        error_ptr=error_THV,
        dd_ptr=dd_THV,
        dfinal_ptr=dfinal.float().contiguous(),
        dstates_ptr=dstates,
        dh0_ptr=dh0,
        r_ptr=r_THV,
        dv_ptr=dv,
        dbeta_ptr=dbeta,
        scale=scale,
        TOKENS=call.total,
    )
    solve = {"beta_ptr": bp, "r_ptr": r_THV}
    dq, dk, dg, dbeta_keys = key_gradients(call, d_THV, dop, states, dstates, scale, solve)
    dbeta = dbeta.sum(0) + dbeta_keys
    grads = [x.view(like.shape).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v), (dbeta, beta))]
    return *grads, None if g is None else dg.view(g.shape).to(g.dtype), dh0
