"""Backward of the delta rule in Triton: the corrections once more, one walk over the states' gradients, the keys'.

Legend: as in kernels.common.triton_chunks; inverse [R, H, C, C]; tensors named *_THV are float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel
from kernels.common.triton_chunks import KEY, key_gradients, tiles
from kernels.common.triton_device import (
    channel_scores,
    chunk_bounds,
    decay_mask,
    load_gate,
    load_state,
    load_tile,
    load_unit,
    row_scale,
    running,
    store_state,
    store_tile,
)
from kernels.common.triton_packed import Packed
from kernels.delta_rule.triton_inverse import inverses, load_square, walk_rows


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
    NORM: tl.constexpr,
):
    """For the backward, from the kept states: error = v - k_in S, d, and the outputs' part of dd = scale * P^T do."""
    line, v0, h = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0, end = chunk_bounds(line, s, cu_ptr, first_ptr, C)
    rq = row_scale(q_ptr, t0, end, h, H, K, NORM, C, BK)
    rk = row_scale(k_ptr, t0, end, h, H, K, NORM, C, BK)
    p = tl.zeros([C, C], tl.float32)
    error = load_tile(v_ptr, t0, end, h, H, V, v0, C, BV).to(tl.float32)
    for k0 in range(0, K, BK):
        q = load_unit(q_ptr, rq, t0, end, h, H, K, k0, NORM, C, BK)
        k = load_unit(k_ptr, rk, t0, end, h, H, K, k0, NORM, C, BK)
        g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
        if CHANNEL:
            p += channel_scores(q, k, g, False, LEVELS, C, PREC)
        else:
            p += tl.dot(q, tl.trans(k), input_precision=PREC)
        state = load_state(states_ptr, line, h, H, K, V, k0, v0, BK, BV).to(k.dtype)
        error -= tl.dot((k * tl.exp(running(g, CHANNEL, False))).to(k.dtype), state, input_precision=PREC)
    if not CHANNEL:
        p *= decay_mask(load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, CHANNEL, C, BK), False, C)
    beta = load_tile(beta_ptr, t0, end, h, H, 1, 0, C, 1).to(tl.float32)
    d = tl.dot(load_square(inverse_ptr, line, h, H, C), beta * error, input_precision=PREC)
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
    NORM: tl.constexpr,
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
        rq = row_scale(q_ptr, t0, eos, h, H, K, NORM, C, BK)
        rk = row_scale(k_ptr, t0, eos, h, H, K, NORM, C, BK)
        q = load_unit(q_ptr, rq, t0, eos, h, H, K, 0, NORM, C, BK)
        k = load_unit(k_ptr, rk, t0, eos, h, H, K, 0, NORM, C, BK)
        do = load_tile(do_ptr, t0, eos, h, H, V, v0, C, BV)
        beta = load_tile(beta_ptr, t0, eos, h, H, 1, 0, C, 1).to(tl.float32)
        g = load_gate(g_ptr, t0, eos, h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        after = load_gate(g_ptr, t0 + 1, tl.minimum(t0 + C, eos), h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        into = tl.exp(running(g, CHANNEL, False))
        k_out = (k * tl.exp(running(after, CHANNEL, True))).to(k.dtype)
        dd = load_tile(dd_ptr, t0, eos, h, H, V, v0, C, BV)
        dd += tl.dot(k_out, ds.to(k.dtype), input_precision=PREC)
        r = tl.dot(tl.trans(load_square(inverse_ptr, line + c, h, H, C)), dd, input_precision=PREC)
        store_tile(r_ptr, r, t0, eos, h, H, V, v0, C, BV)
        partial = tl.sum(r * load_tile(error_ptr, t0, eos, h, H, V, v0, C, BV), 1)
        tl.store(dbeta_ptr + (tile.to(tl.int64) * TOKENS + t0 + i) * H + h, partial, mask=t0 + i < eos)
        r *= beta
        store_tile(dv_ptr, r, t0, eos, h, H, V, v0, C, BV)
        ds = ds * tl.exp(tl.sum(g, 0))[:, None]
        ds += tl.dot(tl.trans((q * into * scale).to(q.dtype)), do, input_precision=PREC)
        ds -= tl.dot(tl.trans((k * into).to(k.dtype)), r.to(k.dtype), input_precision=PREC)
    store_state(dh0_ptr, ds, s, h, H, K, V, 0, v0, BK, BV)


_CORRECTIONS = Kernel(_chunk_corrections, tiles, KEY)
_WALK_BACK = Kernel(_walk_correction_gradients, walk_rows, KEY)


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
    normalize: bool,
) -> tuple[Tensor | None, ...]:
    """As `chunked.backward`."""
    call = Packed([q, k, v, beta, do.to(v.dtype)], g, cu_seqlens, v.shape[3], chunk)
    qp, kp, vp, bp, dop = call.tokens
    inverse = inverses(call, kp, bp, normalize)
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
        NORM=normalize,
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
        NORM=normalize,
    )
    solve = {"beta_ptr": bp, "r_ptr": r_THV, "NORM": normalize}
    dq, dk, dg, dbeta_keys = key_gradients(call, d_THV, dop, states, dstates, scale, solve)
    dbeta = dbeta.sum(0) + dbeta_keys
    grads = [x.view(like.shape).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v), (dbeta, beta))]
    return *grads, None if g is None else dg.view(g.shape).to(g.dtype), dh0
