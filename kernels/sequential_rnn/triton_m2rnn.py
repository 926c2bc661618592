"""The M2RNN in Triton: one program per sequence, head and tile of K walks all of its time; rows of K do not meet.

The forward keeps the state every C steps. The backward goes chunk by chunk from the end: it runs the chunk again into a
scratch of C states per program, then walks it in reverse. Sums over K (outputs, dv, df) and over programs (dw) come as
one part each and are added up here: no atomics.

Packed tokens [T, H, width]; states [S, H, K, V]; float32 but for the operands of the product, in the dtype of v.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, host, offsets, pow2, precision, row
from kernels.common.triton_device import load_state, store_state, tanh
from kernels.common.varlen import chunk_offsets, num_chunks


@triton.jit
def _tokens(k_ptr, v_ptr, f_ptr, reset_ptr, t, head, H, K, V, kk, vv, HAS_RESET: tl.constexpr):
    """k [BK, 1], v [1, BV], the forget gate and whether the state survives, of one token."""
    k = tl.load(k_ptr + (t * H + head) * K + kk, mask=kk < K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + (t * H + head) * V + vv, mask=vv < V, other=0.0).to(tl.float32)
    f = tl.load(f_ptr + t * H + head).to(tl.float32)
    keep = 1.0
    if HAS_RESET:
        keep = (tl.load(reset_ptr + t) == 0).to(tl.float32)
    return k[:, None], v[None, :], f, keep


@triton.jit
def _m2rnn_walk(
    q_ptr,
    k_ptr,
    v_ptr,
    f_ptr,
    w_ptr,
    s0_ptr,
    reset_ptr,
    cu_ptr,
    first_ptr,
    o_ptr,
    final_ptr,
    kept_ptr,
    TOKENS,
    H,
    K,
    V,
    HAS_START: tl.constexpr,
    HAS_RESET: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Outputs as one part per tile of K [K tiles, T, H, V], the last state, and the state at every chunk start."""
    tile = tl.program_id(1)
    s, head = tl.program_id(0) // H, tl.program_id(0) % H
    kk, vv = tile * BK + tl.arange(0, BK), tl.arange(0, BV)
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    w = load_state(w_ptr, tl.full([], 0, tl.int32), head, H, V, V, 0, 0, BV, BV)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        state += load_state(s0_ptr, s, head, H, K, V, tile * BK, 0, BK, BV)
    for t in range(bos, eos):
        if SAVE and (t - bos) % C == 0:
            store_state(kept_ptr, state, line, head, H, K, V, tile * BK, 0, BK, BV)
            line += 1
        k, v, f, keep = _tokens(k_ptr, v_ptr, f_ptr, reset_ptr, t, head, H, K, V, kk, vv, HAS_RESET)
        state = state * keep
        z = tanh(tl.dot(state.to(w.dtype), w, input_precision=PREC) + k * v)
        state = z + f * (state - z)
        q = tl.load(q_ptr + (t * H + head) * K + kk, mask=kk < K, other=0.0).to(tl.float32)
        o = tl.sum(q[:, None] * state, 0)
        tl.store(o_ptr + ((tile.to(tl.int64) * TOKENS + t) * H + head) * V + vv, o, mask=vv < V)
    store_state(final_ptr, state, s, head, H, K, V, tile * BK, 0, BK, BV)


@triton.jit
def _m2rnn_adjoint(
    q_ptr,
    k_ptr,
    v_ptr,
    f_ptr,
    w_ptr,
    reset_ptr,
    cu_ptr,
    first_ptr,
    kept_ptr,
    do_ptr,
    dfinal_ptr,
    scratch_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    df_ptr,
    dw_ptr,
    ds0_ptr,
    clip,
    TOKENS,
    H,
    K,
    V,
    HAS_RESET: tl.constexpr,
    CLIP: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dq, dk; dv [K tiles, T, H, V] and df [K tiles, T, H] as parts; dw one part per program; scratch: 2C states."""
    tile = tl.program_id(1)
    s, head = tl.program_id(0) // H, tl.program_id(0) % H
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tile
    kk, vv = tile * BK + tl.arange(0, BK), tl.arange(0, BV)
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    w = load_state(w_ptr, tl.full([], 0, tl.int32), head, H, V, V, 0, 0, BV, BV)
    w_back = tl.trans(w)
    ds = load_state(dfinal_ptr, s, head, H, K, V, tile * BK, 0, BK, BV)
    dw = tl.zeros([BV, BV], tl.float32)
    # a state in the scratch, every thread's own elements
    own = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
    scratch = scratch_ptr + program * 2 * C * BK * BV + own
    chunks = (eos - bos + C - 1) // C
    for i in range(0, chunks):
        j = chunks - 1 - i
        t0 = bos + j * C
        end = tl.minimum(t0 + C, eos)
        state = load_state(kept_ptr, line + j, head, H, K, V, tile * BK, 0, BK, BV)
        tl.debug_barrier()
        for t in range(t0, end):
            k, v, f, keep = _tokens(k_ptr, v_ptr, f_ptr, reset_ptr, t, head, H, K, V, kk, vv, HAS_RESET)
            state = state * keep
            z = tanh(tl.dot(state.to(w.dtype), w, input_precision=PREC) + k * v)
            tl.store(scratch + (t - t0) * 2 * BK * BV, state)
            tl.store(scratch + ((t - t0) * 2 + 1) * BK * BV, z)
            state = z + f * (state - z)
        # the scratch may be read by other threads of this program than wrote it
        tl.debug_barrier()
        for back in range(0, end - t0):
            t = end - 1 - back
            k, v, f, keep = _tokens(k_ptr, v_ptr, f_ptr, reset_ptr, t, head, H, K, V, kk, vv, HAS_RESET)
            before = tl.load(scratch + (t - t0) * 2 * BK * BV)
            z = tl.load(scratch + ((t - t0) * 2 + 1) * BK * BV)
            q = tl.load(q_ptr + (t * H + head) * K + kk, mask=kk < K, other=0.0).to(tl.float32)[:, None]
            do = tl.load(do_ptr + (t * H + head) * V + vv, mask=vv < V, other=0.0).to(tl.float32)[None, :]
            ds += q * do
            if CLIP:
                ds = tl.minimum(tl.maximum(ds, -clip), clip)
            dp = ds * (1 - f) * (1 - z * z)
            dw += tl.dot(tl.trans(before.to(w.dtype)), dp.to(w.dtype), input_precision=PREC)
            after = z + f * (before - z)
            tl.store(dq_ptr + (t * H + head) * K + kk, tl.sum(after * do, 1), mask=kk < K)
            tl.store(dk_ptr + (t * H + head) * K + kk, tl.sum(dp * v, 1), mask=kk < K)
            part = (tile.to(tl.int64) * TOKENS + t) * H + head
            tl.store(dv_ptr + part * V + vv, tl.sum(dp * k, 0), mask=vv < V)
            tl.store(df_ptr + part, tl.sum(tl.sum(ds * (before - z), 1), 0))
            ds = (f * ds + tl.dot(dp.to(w.dtype), w_back, input_precision=PREC)) * keep
    store_state(ds0_ptr, ds, s, head, H, K, V, tile * BK, 0, BK, BV)
    store_state(dw_ptr, dw, tl.program_id(0) // H * tl.num_programs(1) + tile, head, H, V, V, 0, 0, BV, BV)


# the narrowest tile of any row: how many parts a sum over K can come in
NARROW = 16


def _rows(args: dict[str, Any]) -> list[Row]:
    values = pow2(args["V"])
    widths = (32, NARROW) if args["K"] > NARROW else (NARROW,)
    return [row(BK=width, BV=values, warps=4) for width in widths]


def _adjoint_rows(args: dict[str, Any]) -> list[Row]:
    # the gradient of W is a tile of its own: narrow rows, and more warps for a wide one in float32
    values = pow2(args["V"])
    heavy = values > 32 and args["w_ptr"].dtype == torch.float32
    rows = [row(BK=NARROW, BV=values, warps=warps) for warps in ((8, 4) if heavy else (4, 8))]
    return rows if heavy else [*rows, row(BK=min(pow2(args["K"]), 32), BV=values, warps=8)]


KEY = ("K", "V", "C")
WALK = Kernel(_m2rnn_walk, _rows, KEY, parts=("o_ptr",))
ADJOINT = Kernel(_m2rnn_adjoint, _adjoint_rows, KEY, parts=("dv_ptr", "df_ptr", "dw_ptr"))


class _Call:
    """The call as the kernels see it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f: Tensor,
        w: Tensor,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk: int,
    ):
        self.cu = offsets(q.shape[0], q.shape[1], cu_seqlens, q.device)
        self.sequences, self.heads, self.keys, self.values = self.cu.shape[0] - 1, q.shape[2], q.shape[3], v.shape[3]
        self.tokens, self.parts = q.shape[0] * q.shape[1], -(-q.shape[3] // NARROW)
        packed = host(v.flatten(0, 1))
        self.args: dict[str, Any] = {
            "q_ptr": host(q.flatten(0, 1)),
            "k_ptr": host(k.flatten(0, 1)),
            "v_ptr": packed,
            "f_ptr": host(f.flatten(0, 1)),
            "w_ptr": host(w.to(packed.dtype)),
            "reset_ptr": self.cu if reset is None else reset.to(torch.int8).flatten().contiguous(),
            "cu_ptr": self.cu,
            "first_ptr": chunk_offsets(self.cu, chunk),
            "TOKENS": self.tokens,
            "H": self.heads,
            "K": self.keys,
            "V": self.values,
            "HAS_RESET": reset is not None,
            "C": chunk,
            "PREC": precision(),
        }

    def grid(self, meta: dict[str, int]) -> tuple[int, ...]:
        return (self.sequences * self.heads, -(-self.keys // meta["BK"]))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w_HVV: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `m2rnn_chunked.forward`."""
    call = _Call(q, k, v, f, w_HVV, reset, cu_seqlens, chunk)
    shape = (call.heads, call.keys, call.values)
    rows = num_chunks(q.shape[0], q.shape[1], chunk, cu_seqlens) if save else 0
    # a part that the chosen tile does not have stays at zero
    out = torch.zeros(call.parts, call.tokens, call.heads, call.values, dtype=torch.float32, device=q.device)
    final, kept = out.new_empty(call.sequences, *shape), out.new_empty(rows, *shape)
    start = final if s0 is None else host(s0.float())
    WALK.launch(
        call.grid,
        **call.args,
        s0_ptr=start,
        o_ptr=out,
        final_ptr=final,
        kept_ptr=kept if save else final,
        HAS_START=s0 is not None,
        SAVE=save,
    )
    return out.sum(0).view(v.shape), final, kept


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w_HVV: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `m2rnn_chunked.backward`."""
    call = _Call(q, k, v, f, w_HVV, reset, cu_seqlens, chunk)
    size = call.sequences * call.heads * call.parts
    rows = [dict(r.meta) for r in ADJOINT.rows(call.args)]
    widest = max(-(-call.keys // meta["BK"]) * meta["BK"] * meta["BV"] for meta in rows)
    scratch = kept.new_empty(call.sequences * call.heads * 2 * chunk * widest)
    dq, dk = (kept.new_empty(call.tokens, call.heads, call.keys) for _ in range(2))
    dv = kept.new_zeros(call.parts, call.tokens, call.heads, call.values)
    df = kept.new_zeros(call.parts, call.tokens, call.heads)
    dw = kept.new_zeros(size // call.heads, call.heads, call.values, call.values)
    ds0 = kept.new_empty(dfinal.shape)
    ADJOINT.launch(
        call.grid,
        **call.args,
        kept_ptr=kept,
        do_ptr=host(do.float()),
        dfinal_ptr=host(dfinal.float()),
        scratch_ptr=scratch,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        df_ptr=df,
        dw_ptr=dw,
        ds0_ptr=ds0,
        clip=clip,
        CLIP=clip > 0,
    )
    found = [dq, dk, dv.sum(0), df.sum(0)]
    grads = [d.view(x.shape).to(x.dtype) for d, x in zip(found, (q, k, v, f), strict=True)]
    dq, dk, dv, df = grads
    return dq, dk, dv, df, dw.sum(0).to(w_HVV.dtype), ds0
