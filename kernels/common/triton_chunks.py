"""What the chunkwise kernels share: outputs and key gradients of all chunks at once, and tiles.

Gated linear attention uses them as they are, the delta rule with its corrections in the place of v.

Legend: tensors packed [T, H, D]; states [R, H, K, V], one row per chunk; C chunk, BK/BV tiles.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, pow2, row
from kernels.common.triton_device import (
    channel_scores,
    channel_scores_backward,
    chunk_bounds,
    decay_mask,
    load_gate,
    load_state,
    load_tile,
    load_unit,
    mask_gradient,
    row_scale,
    running,
    store_tile,
)
from kernels.common.triton_packed import Packed


@triton.jit
def _chunk_outputs(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    states_ptr,
    cu_ptr,
    first_ptr,
    seq_ptr,
    o_ptr,
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
    NORM: tl.constexpr = False,
):
    """o = scale * (P v + q_in S) of one chunk, one tile of V."""
    line, v0, h = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0, end = chunk_bounds(line, s, cu_ptr, first_ptr, C)
    rq = row_scale(q_ptr, t0, end, h, H, K, NORM, C, BK)
    rk = row_scale(k_ptr, t0, end, h, H, K, NORM, C, BK)
    p = tl.zeros([C, C], tl.float32)
    o = tl.zeros([C, BV], tl.float32)
    for k0 in range(0, K, BK):
        q = load_unit(q_ptr, rq, t0, end, h, H, K, k0, NORM, C, BK)
        k = load_unit(k_ptr, rk, t0, end, h, H, K, k0, NORM, C, BK)
        g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
        if CHANNEL:
            p += channel_scores(q, k, g, False, LEVELS, C, PREC)
        else:
            p += tl.dot(q, tl.trans(k), input_precision=PREC)
        state = load_state(states_ptr, line, h, H, K, V, k0, v0, BK, BV).to(q.dtype)
        o += tl.dot((q * tl.exp(running(g, CHANNEL, False))).to(q.dtype), state, input_precision=PREC)
    if not CHANNEL:
        p *= decay_mask(load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, CHANNEL, C, BK), False, C)
    v = load_tile(v_ptr, t0, end, h, H, V, v0, C, BV)
    o += tl.dot(p.to(v.dtype), v, input_precision=PREC)
    store_tile(o_ptr, o * scale, t0, end, h, H, V, v0, C, BV)


@triton.jit
def _chunk_key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    do_ptr,
    beta_ptr,
    r_ptr,
    states_ptr,
    dstates_ptr,
    cu_ptr,
    first_ptr,
    seq_ptr,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    dbeta_ptr,
    scale,
    TOKENS,
    S,
    H,
    K,
    V,
    DELTA: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CHANNEL: tl.constexpr,
    LEVELS: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORM: tl.constexpr = False,
):
    """dq, dk, dg of one chunk, one tile of K; a gate per head gets one partial sum per tile [K tiles, T, H].

    DELTA: v holds the corrections, r the gradient through their solve; adds the part of k, beta and g inside it
    (dbeta: partial sums [K tiles, T, H]). NORM: dq and dk are those of the normalised q and k.
    """
    line, tile, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k0 = tile * BK
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0, end = chunk_bounds(line, s, cu_ptr, first_ptr, C)
    i = tl.arange(0, C)
    dp = tl.zeros([C, C], tl.float32)
    dq_in = tl.zeros([C, BK], tl.float32)
    dk_out = tl.zeros([C, BK], tl.float32)
    held = tl.zeros([BK], tl.float32)
    rq = row_scale(q_ptr, t0, end, h, H, K, NORM, C, BK)
    rk = row_scale(k_ptr, t0, end, h, H, K, NORM, C, BK)
    q = load_unit(q_ptr, rq, t0, end, h, H, K, k0, NORM, C, BK)
    k = load_unit(k_ptr, rk, t0, end, h, H, K, k0, NORM, C, BK)
    if DELTA:
        da = tl.zeros([C, C], tl.float32)
        dk_in = tl.zeros([C, BK], tl.float32)
        beta = load_tile(beta_ptr, t0, end, h, H, 1, 0, C, 1).to(tl.float32)
    for v0 in range(0, V, BV):
        do = load_tile(do_ptr, t0, end, h, H, V, v0, C, BV)
        v = load_tile(v_ptr, t0, end, h, H, V, v0, C, BV).to(do.dtype)
        state = load_state(states_ptr, line, h, H, K, V, k0, v0, BK, BV)
        ds = load_state(dstates_ptr, line, h, H, K, V, k0, v0, BK, BV)
        held += tl.sum(state * ds, 1)
        dp += tl.dot(do, tl.trans(v), input_precision=PREC)
        dq_in += tl.dot(do, tl.trans(state.to(do.dtype)), input_precision=PREC)
        dk_out += tl.dot(v, tl.trans(ds.to(do.dtype)), input_precision=PREC)
        if DELTA:
            r = load_tile(r_ptr, t0, end, h, H, V, v0, C, BV)
            da -= tl.dot(r.to(do.dtype), tl.trans(v), input_precision=PREC)
            dk_in -= tl.dot((r * beta).to(do.dtype), tl.trans(state.to(do.dtype)), input_precision=PREC)
    dp *= scale
    dq_in *= scale
    g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
    after = load_gate(g_ptr, t0 + 1, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
    into, out = tl.exp(running(g, CHANNEL, False)), tl.exp(running(after, CHANNEL, True))
    x_into, x_out = q * into * dq_in, k * out * dk_out
    dq, dk = dq_in * into, dk_out * out
    if DELTA:
        strict = i[:, None] > i[None, :]
        da = tl.where(strict, da, 0.0)
        dk += dk_in * into
        x_into += k * into * dk_in
    x_total = held * tl.exp(tl.sum(g, 0))
    if CHANNEL:
        lower = (i[:, None] >= i[None, :]).to(tl.float32)
        upper = (i[:, None] < i[None, :]).to(tl.float32)
        pq, pk, dg = channel_scores_backward(q, k, g, dp, False, LEVELS, C, PREC)
        dq += pq
        dk += pk
        dg += tl.dot(tl.trans(lower), x_into, input_precision=PREC)
        dg += tl.dot(tl.trans(upper), x_out, input_precision=PREC) + x_total[None, :]
        if DELTA:
            kk = channel_scores(k, k, g, True, LEVELS, C, PREC)
            rows, columns, dg_solve = channel_scores_backward(k, k, g, da * beta, True, LEVELS, C, PREC)
            dk += rows + columns
            dg += dg_solve
        store_tile(dg_ptr, dg, t0, end, h, H, K, k0, C, BK)
    else:
        mask = decay_mask(g, False, C)
        inner = (dp * mask).to(q.dtype)
        dq += tl.dot(inner, k, input_precision=PREC)
        dk += tl.dot(tl.trans(inner), q, input_precision=PREC)
        through = tl.dot(q, tl.trans(k), input_precision=PREC) * mask * dp
        if DELTA:
            kk = tl.dot(k, tl.trans(k), input_precision=PREC) * tl.where(strict, mask, 0.0)
            solve = (da * beta * mask).to(k.dtype)
            dk += tl.dot(solve, k, input_precision=PREC) + tl.dot(tl.trans(solve), k, input_precision=PREC)
            through += kk * da * beta
        if HAS_GATE:
            later, earlier = i[:, None] >= i[None, :], i[:, None] < i[None, :]
            dg = mask_gradient(through, C) + tl.sum(x_total, 0)
            dg += tl.sum(tl.where(later, tl.sum(x_into, 1)[:, None], 0.0), 0)
            dg += tl.sum(tl.where(earlier, tl.sum(x_out, 1)[:, None], 0.0), 0)
            tl.store(dg_ptr + (tile.to(tl.int64) * TOKENS + t0 + i) * H + h, dg, mask=t0 + i < end)
    if DELTA:
        tl.store(dbeta_ptr + (tile.to(tl.int64) * TOKENS + t0 + i) * H + h, tl.sum(da * kk, 1), mask=t0 + i < end)
    store_tile(dq_ptr, dq, t0, end, h, H, K, k0, C, BK)
    store_tile(dk_ptr, dk, t0, end, h, H, K, k0, C, BK)


@triton.jit
def _norm_gradients(x_ptr, dx_ptr, ROWS, D, BT: tl.constexpr, BD: tl.constexpr):
    """In place: gradient of y = x / sqrt(|x|^2 + 1e-6) to gradient of x, r (dy - y <y, dy>) with r = |y| / |x|."""
    i = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    at, inside = i[:, None] * D + d[None, :], (i < ROWS)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dx_ptr + at, mask=inside, other=0.0)
    r = tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None]
    y = x * r
    tl.store(dx_ptr + at, r * (dy - y * tl.sum(y * dy, 1)[:, None]), mask=inside)


def tiles(args: dict[str, Any], most_k: int = 64, most_v: int = 64, warps: int = 4) -> list[Row]:
    """Rows for a kernel that tiles both widths; the first spills nothing in bfloat16 (kernels/aot/table.json)."""
    if args["CHANNEL"] or args["k_ptr" if "k_ptr" in args else "q_ptr"].dtype == torch.float32:
        most_k, most_v = min(most_k, 32), min(most_v, 32)
    bk, bv = min(pow2(args["K"]), most_k), min(pow2(args["V"]), most_v)
    options = [row(BK=bk, BV=bv, warps=warps), row(BK=bk, BV=bv, warps=12 - warps), row(BK=bk, BV=max(16, bv // 2))]
    return list(dict.fromkeys(options))


def _key_rows(args: dict[str, Any]) -> list[Row]:
    small = 16 if args["CHANNEL"] or args["k_ptr"].dtype == torch.float32 else 32
    return tiles(args, small, small, warps=8)


KEY = ("K", "V", "C", "CHANNEL")
FUSED_KEY = ("K", "V", "C")
OUTPUTS = Kernel(_chunk_outputs, tiles, KEY)
KEYS = Kernel(_chunk_key_gradients, _key_rows, (*KEY, "DELTA"))
# one row only: a kernel that writes over its input cannot be timed by running it again
NORMS = Kernel(_norm_gradients, lambda args: [row(BT=16, BD=pow2(args["D"]), warps=4, stages=1)], ("D",))


def key_gradients(
    call: Packed, values: Tensor, do: Tensor, states: Tensor, dstates: Tensor, scale: float, solve: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_chunk_key_gradients`: dq, dk, dg [T, H(, K)] (summed over tiles) and, for the delta rule, dbeta."""
    qp, kp = call.tokens[0], call.tokens[1]
    norm = bool(solve.get("NORM"))
    # the gradients of normalised rows still have to go through the normalisation, in full precision
    dq, dk = (torch.empty_like(x, dtype=torch.float32 if norm else x.dtype) for x in (qp, kp))
    smallest = min(dict(r.meta)["BK"] for r in KEYS.rows({**call.chunk, "k_ptr": kp}))
    partial = (-(-call.width_k // smallest), call.total, call.heads)
    channel = call.chunk["CHANNEL"]
    dg = torch.zeros_like(dq, dtype=torch.float32) if channel else dq.new_zeros(partial, dtype=torch.float32)
    dbeta = dq.new_zeros(partial if solve else 0, dtype=torch.float32)
    KEYS.launch(
        call.key_grid,
        **call.chunk,
        **{"beta_ptr": qp, "r_ptr": qp, **solve},
        q_ptr=qp,
        k_ptr=kp,
        v_ptr=values,
        do_ptr=do,
        states_ptr=states,
        dstates_ptr=dstates,
        dq_ptr=dq,
        dk_ptr=dk,
        dg_ptr=dg,
        dbeta_ptr=dbeta,
        scale=scale,
        TOKENS=call.total,
        DELTA=bool(solve),
    )
    if norm:
        for x, dx in ((qp, dq), (kp, dk)):
            NORMS.launch(
                lambda meta: (-(-call.total * call.heads // meta["BT"]),),
                x_ptr=x,
                dx_ptr=dx,
                ROWS=call.total * call.heads,
                D=call.width_k,
            )
    return dq, dk, dg if channel else dg.sum(0), dbeta.sum(0)
