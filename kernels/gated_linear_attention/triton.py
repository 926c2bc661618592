"""Gated linear attention in Triton: states first, then all chunks at once. Two launches forward, three backward.

The walk over chunks keeps a [BK, BV] tile of the state on chip and writes it once per chunk; the rest is parallel over
chunks, most of it in `kernels.common.triton_chunks`. Where sequences, heads and tiles of V alone fill the card, one
walk writes the outputs too: one launch, and without a backward to come no state ever leaves the chip.

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
from kernels.common.triton_chunks import FUSED_KEY, KEY, OUTPUTS, key_gradients, tiles
from kernels.common.triton_device import (
    channel_scores,
    chunk_bounds,
    decay_mask,
    load_gate,
    load_state,
    load_tile,
    running,
    store_state,
    store_tile,
)
from kernels.common.triton_packed import Packed


@triton.jit
def _walk_states(
    k_ptr,
    v_ptr,
    g_ptr,
    h0_ptr,
    cu_ptr,
    first_ptr,
    states_ptr,
    final_ptr,
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
    """State at the start of every chunk, and the last one."""
    k0, v0 = tl.program_id(2) * BK, tl.program_id(1) * BV
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        state += load_state(h0_ptr, s, h, H, K, V, k0, v0, BK, BV)
    for t0 in range(bos, eos, C):
        store_state(states_ptr, state, line, h, H, K, V, k0, v0, BK, BV)
        k = load_tile(k_ptr, t0, eos, h, H, K, k0, C, BK)
        v = load_tile(v_ptr, t0, eos, h, H, V, v0, C, BV)
        total = tl.exp(tl.sum(load_gate(g_ptr, t0, eos, h, H, K, k0, HAS_GATE, CHANNEL, C, BK), 0))
        # the gate of the next token onwards: what happens to this token's key until the chunk ends
        end = tl.minimum(t0 + C, eos)
        after = load_gate(g_ptr, t0 + 1, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
        k_out = (k * tl.exp(running(after, CHANNEL, True))).to(k.dtype)
        state = state * total[:, None] + tl.dot(tl.trans(k_out), v, input_precision=PREC)
        line += 1
    store_state(final_ptr, state, s, h, H, K, V, k0, v0, BK, BV)


@triton.jit
def _walk_outputs(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    h0_ptr,
    cu_ptr,
    first_ptr,
    states_ptr,
    final_ptr,
    o_ptr,
    scale,
    H,
    K,
    V,
    HAS_START: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The fused walk: outputs, the last state, and (SAVE) the state at the start of every chunk.

    One decay per head only, so it scales rows: of the outputs and of v, which is narrower than k.
    """
    v0 = tl.program_id(1) * BV
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        state += load_state(h0_ptr, s, h, H, K, V, 0, v0, BK, BV)
    for t0 in range(bos, eos, C):
        if SAVE:
            store_state(states_ptr, state, line, h, H, K, V, 0, v0, BK, BV)
        end = tl.minimum(t0 + C, eos)
        g = load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, False, C, BK)
        q = load_tile(q_ptr, t0, end, h, H, K, 0, C, BK)
        o = tl.dot(q, state.to(q.dtype), input_precision=PREC) * tl.exp(running(g, False, False))
        k = load_tile(k_ptr, t0, end, h, H, K, 0, C, BK)
        p = tl.dot(q, tl.trans(k), input_precision=PREC) * decay_mask(g, False, C)
        v = load_tile(v_ptr, t0, end, h, H, V, v0, C, BV)
        o += tl.dot(p.to(v.dtype), v, input_precision=PREC)
        store_tile(o_ptr, o * scale, t0, end, h, H, V, v0, C, BV)
        after = load_gate(g_ptr, t0 + 1, end, h, H, K, 0, HAS_GATE, False, C, BK)
        v_out = (v * tl.exp(running(after, False, True))).to(v.dtype)
        state = state * tl.exp(tl.sum(g, 0))[:, None] + tl.dot(tl.trans(k), v_out, input_precision=PREC)
        line += 1
    store_state(final_ptr, state, s, h, H, K, V, 0, v0, BK, BV)


@triton.jit
def _walk_state_gradients(
    q_ptr,
    do_ptr,
    g_ptr,
    dfinal_ptr,
    cu_ptr,
    first_ptr,
    dstates_ptr,
    dh0_ptr,
    scale,
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
    """Gradient of the state at the end of every chunk, last chunk first, and of the initial state."""
    k0, v0 = tl.program_id(2) * BK, tl.program_id(1) * BV
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    chunks = (eos - bos + C - 1) // C
    ds = load_state(dfinal_ptr, s, h, H, K, V, k0, v0, BK, BV)
    for back in range(0, chunks):
        c = chunks - 1 - back
        t0 = bos + c * C
        store_state(dstates_ptr, ds, line + c, h, H, K, V, k0, v0, BK, BV)
        q = load_tile(q_ptr, t0, eos, h, H, K, k0, C, BK)
        do = load_tile(do_ptr, t0, eos, h, H, V, v0, C, BV)
        g = load_gate(g_ptr, t0, eos, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
        q_in = (q * tl.exp(running(g, CHANNEL, False)) * scale).to(q.dtype)
        ds = ds * tl.exp(tl.sum(g, 0))[:, None] + tl.dot(tl.trans(q_in), do, input_precision=PREC)
    store_state(dh0_ptr, ds, s, h, H, K, V, k0, v0, BK, BV)


@triton.jit
def _chunk_value_gradients(
    q_ptr,
    k_ptr,
    do_ptr,
    g_ptr,
    dstates_ptr,
    cu_ptr,
    first_ptr,
    seq_ptr,
    dv_ptr,
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
    """dv = scale * P^T do + k_out dS of one chunk, one tile of V."""
    line, v0, h = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0, end = chunk_bounds(line, s, cu_ptr, first_ptr, C)
    p = tl.zeros([C, C], tl.float32)
    dv = tl.zeros([C, BV], tl.float32)
    for k0 in range(0, K, BK):
        q = load_tile(q_ptr, t0, end, h, H, K, k0, C, BK)
        k = load_tile(k_ptr, t0, end, h, H, K, k0, C, BK)
        if CHANNEL:
            g = load_gate(g_ptr, t0, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
            p += channel_scores(q, k, g, False, LEVELS, C, PREC)
        else:
            p += tl.dot(q, tl.trans(k), input_precision=PREC)
        after = load_gate(g_ptr, t0 + 1, end, h, H, K, k0, HAS_GATE, CHANNEL, C, BK)
        k_out = (k * tl.exp(running(after, CHANNEL, True))).to(k.dtype)
        ds = load_state(dstates_ptr, line, h, H, K, V, k0, v0, BK, BV).to(k.dtype)
        dv += tl.dot(k_out, ds, input_precision=PREC)
    if not CHANNEL:
        p *= decay_mask(load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, CHANNEL, C, BK), False, C)
    do = load_tile(do_ptr, t0, end, h, H, V, v0, C, BV)
    dv += tl.dot(tl.trans((p * scale).to(do.dtype)), do, input_precision=PREC)
    store_tile(dv_ptr, dv, t0, end, h, H, V, v0, C, BV)


def _fused_rows(args: dict[str, Any]) -> list[Row]:
    """All of K on chip, so the tile of V is narrow."""
    bk = pow2(args["K"])
    bv = min(pow2(args["V"]), 32 if bk <= 64 else 16)
    return [row(BK=bk, BV=bv, warps=w, stages=1) for w in (8, 4)]


_WALK = Kernel(_walk_states, tiles, KEY)
_FUSED = Kernel(_walk_outputs, _fused_rows, FUSED_KEY)
_WALK_BACK = Kernel(_walk_state_gradients, tiles, KEY)
_VALUES = Kernel(_chunk_value_gradients, tiles, KEY)


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
    """As `chunked.forward`."""
    call = Packed([q, k, v], g, cu_seqlens, v.shape[3], chunk)
    qp, kp, vp = call.tokens
    out, final = torch.empty_like(vp), call.states(call.sequences)
    start = None if h0 is None else h0.float().contiguous()
    if call.fuses(_FUSED):
        kept = call.states(call.rows if save else 0)
        _FUSED.launch(
            call.fused_grid,
            **call.fused,
            q_ptr=qp,
            k_ptr=kp,
            v_ptr=vp,
            h0_ptr=final if start is None else start,
            states_ptr=kept if save else final,
            final_ptr=final,
            o_ptr=out,
            scale=scale,
            HAS_START=start is not None,
            SAVE=save,
        )
        return out.view(v.shape).to(v.dtype), final, kept if save else final.new_empty(0)
    states = call.states(call.rows)
    _WALK.launch(
        call.walk_grid,
        **call.walk,
        k_ptr=kp,
        v_ptr=vp,
        h0_ptr=final if start is None else start,
        states_ptr=states,
        final_ptr=final,
        HAS_START=start is not None,
    )
    OUTPUTS.launch(
        call.value_grid, **call.chunk, q_ptr=qp, k_ptr=kp, v_ptr=vp, states_ptr=states, o_ptr=out, scale=scale
    )
    return out.view(v.shape).to(v.dtype), final, states if save else states.new_empty(0)


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
    """As `chunked.backward`."""
    call = Packed([q, k, v, do.to(v.dtype)], g, cu_seqlens, v.shape[3], chunk)
    qp, kp, vp, dop = call.tokens
    dstates, dh0 = call.states(call.rows), call.states(call.sequences)
    _WALK_BACK.launch(
        call.walk_grid,
        **call.walk,
        q_ptr=qp,
        do_ptr=dop,
        dfinal_ptr=dfinal.float().contiguous(),
        dstates_ptr=dstates,
        dh0_ptr=dh0,
        scale=scale,
    )
    dv = torch.empty_like(vp)
    _VALUES.launch(
        call.value_grid, **call.chunk, q_ptr=qp, k_ptr=kp, do_ptr=dop, dstates_ptr=dstates, dv_ptr=dv, scale=scale
    )
    dq, dk, dg, _ = key_gradients(call, vp, dop, states, dstates, scale, {})
    grads = [x.view(like.shape).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v))]
    return *grads, None if g is None else dg.view(g.shape).to(g.dtype), dh0
