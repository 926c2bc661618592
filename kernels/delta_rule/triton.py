"""The delta rule in Triton: inverse of every chunk's triangle, one walk over the states, outputs. Three launches.

Where sequences, heads and tiles of V alone fill the card, one walk does all of it in a single launch.

(I + A)^-1 is built by halves of halves in float32, T <- T - T A_square T, which is forward substitution in blocks
(squaring A loses everything on correlated keys). The walk solves for the corrections with it; outputs and key
gradients are those of gated linear attention with the corrections in the place of v. Four launches backward, and two
small ones where q and k are normalised in the kernels: their rows are brought to length 1 as they are loaded.

Legend: as in kernels.common.triton_chunks; inverse [R, H, C, C]; tensors named *_THV are float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, pow2, row
from kernels.common.triton_chunks import FUSED_KEY, KEY, OUTPUTS
from kernels.common.triton_device import (
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
from kernels.delta_rule.triton_backward import backward
from kernels.delta_rule.triton_inverse import inverses, invert, load_square, walk_rows

__all__ = ["backward", "forward"]


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
    NORM: tl.constexpr,
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
        rk = row_scale(k_ptr, t0, eos, h, H, K, NORM, C, BK)
        k = load_unit(k_ptr, rk, t0, eos, h, H, K, 0, NORM, C, BK)
        v = load_tile(v_ptr, t0, eos, h, H, V, v0, C, BV).to(tl.float32)
        beta = load_tile(beta_ptr, t0, eos, h, H, 1, 0, C, 1).to(tl.float32)
        g = load_gate(g_ptr, t0, eos, h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        after = load_gate(g_ptr, t0 + 1, tl.minimum(t0 + C, eos), h, H, K, 0, HAS_GATE, CHANNEL, C, BK)
        k_in = (k * tl.exp(running(g, CHANNEL, False))).to(k.dtype)
        k_out = (k * tl.exp(running(after, CHANNEL, True))).to(k.dtype)
        error = beta * (v - tl.dot(k_in, state.to(k.dtype), input_precision=PREC))
        d = tl.dot(load_square(inverse_ptr, line, h, H, C), error, input_precision=PREC)
        store_tile(d_ptr, d, t0, eos, h, H, V, v0, C, BV)
        state = state * tl.exp(tl.sum(g, 0))[:, None]
        state += tl.dot(tl.trans(k_out), d.to(k.dtype), input_precision=PREC)
        line += 1
    store_state(final_ptr, state, s, h, H, K, V, 0, v0, BK, BV)


@triton.jit
def _walk_corrected_outputs(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
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
    LEVELS: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORM: tl.constexpr,
):
    """The fused walk: inverse, corrections, outputs, the last state, and (SAVE) the state at every chunk's start.

    One decay per head only, so it scales rows: of the outputs and of the corrections, which are narrower than k.
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
        rk = row_scale(k_ptr, t0, end, h, H, K, NORM, C, BK)
        k = load_unit(k_ptr, rk, t0, end, h, H, K, 0, NORM, C, BK)
        beta = load_tile(beta_ptr, t0, end, h, H, 1, 0, C, 1).to(tl.float32)
        g = load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, False, C, BK)
        into = tl.exp(running(g, False, False))
        v = load_tile(v_ptr, t0, end, h, H, V, v0, C, BV)
        error = v - into * tl.dot(k, state.to(k.dtype), input_precision=PREC)
        a = tl.dot(k, tl.trans(k), input_precision=PREC) * decay_mask(g, True, C)
        inverse = invert(a * beta, LEVELS, C, PREC)
        d = tl.dot(inverse, beta * error, input_precision=PREC).to(v.dtype)
        rq = row_scale(q_ptr, t0, end, h, H, K, NORM, C, BK)
        q = load_unit(q_ptr, rq, t0, end, h, H, K, 0, NORM, C, BK)
        o = into * tl.dot(q, state.to(q.dtype), input_precision=PREC)
        p = tl.dot(q, tl.trans(k), input_precision=PREC) * decay_mask(g, False, C)
        o += tl.dot(p.to(v.dtype), d, input_precision=PREC)
        store_tile(o_ptr, o * scale, t0, end, h, H, V, v0, C, BV)
        after = load_gate(g_ptr, t0 + 1, end, h, H, K, 0, HAS_GATE, False, C, BK)
        d_out = (d * tl.exp(running(after, False, True))).to(v.dtype)
        state = state * tl.exp(tl.sum(g, 0))[:, None] + tl.dot(tl.trans(k), d_out, input_precision=PREC)
        line += 1
    store_state(final_ptr, state, s, h, H, K, V, 0, v0, BK, BV)


def _fused_rows(args: dict[str, Any]) -> list[Row]:
    """All of K on chip; few tiles of V, since each builds the inverse for itself."""
    bk, bv = pow2(args["K"]), pow2(args["V"])
    return list(dict.fromkeys(row(BK=bk, BV=min(bv, most), warps=8, stages=1) for most in (64, 16)))


_WALK = Kernel(_walk_corrections, walk_rows, KEY)
_FUSED = Kernel(_walk_corrected_outputs, _fused_rows, FUSED_KEY)


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
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.forward`."""
    call = Packed([q, k, v, beta], g, cu_seqlens, v.shape[3], chunk)
    qp, kp, vp, bp = call.tokens
    out, final = torch.empty_like(vp), call.states(call.sequences)
    start = None if h0 is None else h0.float().contiguous()
    if call.fuses(_FUSED, most_k=64):
        kept = call.states(call.rows if save else 0)
        _FUSED.launch(
            call.fused_grid,
            **call.fused,
            q_ptr=qp,
            k_ptr=kp,
            v_ptr=vp,
            beta_ptr=bp,
            h0_ptr=final if start is None else start,
            states_ptr=kept if save else final,
            final_ptr=final,
            o_ptr=out,
            scale=scale,
            HAS_START=start is not None,
            SAVE=save,
            LEVELS=call.chunk["LEVELS"],
            NORM=normalize,
        )
        return out.view(v.shape).to(v.dtype), final, kept if save else final.new_empty(0)
    states, d_THV = call.states(call.rows), torch.empty_like(vp)
    _WALK.launch(
        call.walk_grid,
        **call.walk,
        k_ptr=kp,
        v_ptr=vp,
        beta_ptr=bp,
        inverse_ptr=inverses(call, kp, bp, normalize),
        h0_ptr=final if start is None else start,
        states_ptr=states,
        final_ptr=final,
        d_ptr=d_THV,
        HAS_START=start is not None,
        NORM=normalize,
    )
    OUTPUTS.launch(
        call.value_grid,
        **call.chunk,
        q_ptr=qp,
        k_ptr=kp,
        v_ptr=d_THV,
        states_ptr=states,
        o_ptr=out,
        scale=scale,
        NORM=normalize,
    )
    return out.view(v.shape).to(v.dtype), final, states if save else states.new_empty(0)
