"""Diagonal recurrence in Triton: tiles of [BT, BN] scanned on chip, time cut into segments when channels are few.

One segment: one launch, every byte once. Several: summaries, their carry, then the walk, which re-reads through L2.
Rows are packed [T, N]; a dense batch is a packed one with equal lengths. Complex numbers are two float planes.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.triton import Kernel, host, offsets, row


@triton.jit
def _combine(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def _combine_complex(a1, b1, u1, v1, a2, b2, u2, v2):
    return a1 * a2 - b1 * b2, a1 * b2 + b1 * a2, a2 * u1 - b2 * v1 + u2, a2 * v1 + b2 * u1 + v2


@triton.jit
def _scan_segments(
    a_ptr,
    u_ptr,
    start_ptr,
    cu_ptr,
    out_ptr,
    end_ptr,
    prev_ptr,
    first_ptr,
    da_ptr,
    N,
    SEGMENT,
    SUMMARY: tl.constexpr,
    REVERSE: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One segment of one sequence, BN channels.

    SUMMARY: out = product of gates, end = last value from zero, both [S, segments, N].
    Else: out = every state [T, N], end = last state [S, N] written by the last segment; REVERSE also writes
    da_t = out_t * prev_{t-1}, where prev is the forward's h (its state before the first token: first_ptr).
    REVERSE walks from the last token with the gate of the following token (none after the last).
    """
    W: tl.constexpr = 2 if COMPLEX else 1
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.program_id(0).to(tl.int64)
    j = tl.program_id(2)
    live = n < N
    bos = tl.load(cu_ptr + s)
    length = tl.load(cu_ptr + s + 1) - bos
    begin = j.to(tl.int64) * SEGMENT
    end = tl.minimum(begin + SEGMENT, length)
    slot = ((s * tl.num_programs(2) + j) * N + n) * W
    rows = tl.arange(0, BT)
    carry = tl.zeros([BN], tl.float32)
    carry_i = tl.zeros([BN], tl.float32)
    total = tl.full([BN], 1.0, tl.float32)
    total_i = tl.zeros([BN], tl.float32)
    if HAS_START:
        carry = tl.load(start_ptr + slot, mask=live, other=0.0)
        if COMPLEX:
            carry_i = tl.load(start_ptr + slot + 1, mask=live, other=0.0)
    for i0 in range(begin, end, BT):
        i = i0 + rows
        if REVERSE:
            t = bos + length - 1 - i
            shifted = t + 1
            gated = (i < end) & (i > 0)
        else:
            t = bos + i
            shifted = t
            gated = i < end
        at = (t[:, None] * N + n[None, :]) * W
        inside = (i < end)[:, None] & live[None, :]
        gate_at = (shifted[:, None] * N + n[None, :]) * W
        gate_in = gated[:, None] & live[None, :]
        # rows beyond the end are the identity (1, 0), so the tile's last row is always the carry
        a = tl.load(a_ptr + gate_at, mask=gate_in, other=1.0).to(tl.float32)
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        last = (rows == BT - 1)[:, None]
        if COMPLEX:
            b = tl.load(a_ptr + gate_at + 1, mask=gate_in, other=0.0).to(tl.float32)
            v = tl.load(u_ptr + at + 1, mask=inside, other=0.0).to(tl.float32)
            if REVERSE:
                b = -b
            a, b, u, v = tl.associative_scan((a, b, u, v), 0, _combine_complex)
            h = a * carry[None, :] - b * carry_i[None, :] + u
            h_i = a * carry_i[None, :] + b * carry[None, :] + v
            if SUMMARY:
                step = tl.sum(tl.where(last, a, 0.0), 0)
                step_i = tl.sum(tl.where(last, b, 0.0), 0)
                total, total_i = total * step - total_i * step_i, total * step_i + total_i * step
            carry_i = tl.sum(tl.where(last, h_i, 0.0), 0)
        else:
            a, u = tl.associative_scan((a, u), 0, _combine)
            h = a * carry[None, :] + u
            if SUMMARY:
                total = total * tl.sum(tl.where(last, a, 0.0), 0)
        carry = tl.sum(tl.where(last, h, 0.0), 0)
        if not SUMMARY:
            tl.store(out_ptr + at, h, mask=inside)
            if COMPLEX:
                tl.store(out_ptr + at + 1, h_i, mask=inside)
            if REVERSE:
                before = at - N * W
                has = inside & (t > bos)[:, None]
                p = tl.load(prev_ptr + before, mask=has, other=0.0).to(tl.float32)
                if HAS_FIRST:
                    at_first = inside & (t == bos)[:, None]
                    first_at = (s * N + n)[None, :] * W + tl.zeros([BT, 1], tl.int64)
                    p += tl.load(first_ptr + first_at, mask=at_first, other=0.0)
                if COMPLEX:
                    p_i = tl.load(prev_ptr + before + 1, mask=has, other=0.0).to(tl.float32)
                    if HAS_FIRST:
                        p_i += tl.load(first_ptr + first_at + 1, mask=at_first, other=0.0)
                    tl.store(da_ptr + at, h * p + h_i * p_i, mask=inside)
                    tl.store(da_ptr + at + 1, h_i * p - h * p_i, mask=inside)
                else:
                    tl.store(da_ptr + at, h * p, mask=inside)
    if SUMMARY:
        tl.store(out_ptr + slot, total, mask=live)
        tl.store(end_ptr + slot, carry, mask=live)
        if COMPLEX:
            tl.store(out_ptr + slot + 1, total_i, mask=live)
            tl.store(end_ptr + slot + 1, carry_i, mask=live)
    elif j == tl.num_programs(2) - 1:
        tl.store(end_ptr + (s * N + n) * W, carry, mask=live)
        if COMPLEX:
            tl.store(end_ptr + (s * N + n) * W + 1, carry_i, mask=live)


@triton.jit
def _carry_segments(
    total_ptr,
    last_ptr,
    h0_ptr,
    start_ptr,
    N,
    SEGMENTS,
    COMPLEX: tl.constexpr,
    BN: tl.constexpr,
):
    """start[s, j] = state before segment j: the same recurrence over the summaries."""
    W: tl.constexpr = 2 if COMPLEX else 1
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.program_id(0).to(tl.int64)
    live = n < N
    c = tl.load(h0_ptr + (s * N + n) * W, mask=live, other=0.0)
    if COMPLEX:
        c_i = tl.load(h0_ptr + (s * N + n) * W + 1, mask=live, other=0.0)
    for j in range(0, SEGMENTS):
        slot = ((s * SEGMENTS + j) * N + n) * W
        tl.store(start_ptr + slot, c, mask=live)
        a = tl.load(total_ptr + slot, mask=live, other=1.0)
        u = tl.load(last_ptr + slot, mask=live, other=0.0)
        if COMPLEX:
            tl.store(start_ptr + slot + 1, c_i, mask=live)
            b = tl.load(total_ptr + slot + 1, mask=live, other=0.0)
            v = tl.load(last_ptr + slot + 1, mask=live, other=0.0)
            c, c_i = a * c - b * c_i + u, a * c_i + b * c + v
        else:
            c = a * c + u


_SCAN = Kernel(
    _scan_segments,
    lambda args: [row(BT=32, BN=32, warps=2), row(BT=32, BN=64, warps=4), row(BT=16, BN=128, warps=4)],
    key=("SUMMARY", "REVERSE", "COMPLEX"),
)
_CARRY = Kernel(_carry_segments, lambda args: [row(BN=64, warps=2)], key=("COMPLEX",))
# below this many programs of 32 channels a card of 132 processors idles, and time is cut into segments
BUSY = 512
SEGMENT_LEAST = 512


def _run(
    a: Tensor, u: Tensor, start: Tensor | None, cu: Tensor, extra: dict[str, Any], segment: int | None
) -> tuple[Tensor, Tensor]:
    """Scan packed rows [T, N] (real planes); returns all states and the last ones [S, N]."""
    is_complex = u.dim() == 3
    length, channels = u.shape[0], u.shape[1]
    sequences = cu.shape[0] - 1
    state = (sequences, channels, 2) if is_complex else (sequences, channels)
    out, end = torch.empty_like(u), u.new_empty(state, dtype=torch.float32)
    if segment is None:
        programs = -(-channels // 32) * sequences
        segment = length if programs >= BUSY else max(SEGMENT_LEAST, -(-length * programs // (2 * BUSY)))
    segments = max(1, -(-length // segment))
    shared = {"a_ptr": a, "u_ptr": u, "cu_ptr": cu, "N": channels, "SEGMENT": segment, "COMPLEX": is_complex}

    def grid(meta: dict[str, int]) -> tuple[int, ...]:
        return (sequences, -(-channels // meta["BN"]), segments)

    if segments > 1:
        summary = (sequences, segments, *state[1:])
        total, last, starts = (u.new_empty(summary, dtype=torch.float32) for _ in range(3))
        nothing = {"prev_ptr": u, "first_ptr": end, "da_ptr": out, "HAS_FIRST": False}
        _SCAN.launch(
            grid,
            **shared,
            **nothing,
            start_ptr=end,
            out_ptr=total,
            end_ptr=last,
            SUMMARY=True,
            REVERSE=extra["REVERSE"],
            HAS_START=False,
        )
        h0 = torch.zeros_like(end) if start is None else start
        _CARRY.launch(
            lambda meta: (sequences, -(-channels // meta["BN"])),
            total_ptr=total,
            last_ptr=last,
            h0_ptr=h0,
            start_ptr=starts,
            N=channels,
            SEGMENTS=segments,
            COMPLEX=is_complex,
        )
        start = starts
    _SCAN.launch(
        grid,
        **shared,
        **{"prev_ptr": u, "first_ptr": end, "da_ptr": out, "HAS_FIRST": False, **extra},
        start_ptr=end if start is None else start,
        out_ptr=out,
        end_ptr=end,
        SUMMARY=False,
        HAS_START=start is not None,
    )
    return out, end


def _planes(x: Tensor) -> Tensor:
    return host(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)


def _packed(x: Tensor) -> Tensor:
    return _planes(x).flatten(0, 1)


def _back(x: Tensor, like: Tensor) -> Tensor:
    joined = torch.view_as_complex(x) if like.is_complex() else x
    return joined.reshape(like.shape).to(like.dtype)


def _state(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _planes(x.to(state_dtype(dtype)))


def forward(
    a_BTN: Tensor,
    u_BTN: Tensor,
    h0_SN: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `chunked.forward`; `chunk` is not used (tiles are the tuner's), `segment` is for the tests."""
    cu = offsets(u_BTN.shape[0], u_BTN.shape[1], cu_seqlens, u_BTN.device)
    h, end = _run(_packed(a_BTN), _packed(u_BTN), _state(h0_SN, u_BTN.dtype), cu, {"REVERSE": False}, segment)
    return _back(h, u_BTN), torch.view_as_complex(end) if u_BTN.is_complex() else end


def backward(
    dh_BTN: Tensor,
    dfinal_SN: Tensor,
    a_BTN: Tensor,
    h_BTN: Tensor,
    h0_SN: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    segment: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.backward`: the reversed scan, gate gradients written on the way."""
    cu = offsets(h_BTN.shape[0], h_BTN.shape[1], cu_seqlens, h_BTN.device)
    first = _state(h0_SN, h_BTN.dtype)
    a = _packed(a_BTN)
    da = torch.empty_like(a)
    extra = {"REVERSE": True, "prev_ptr": _packed(h_BTN), "da_ptr": da, "HAS_FIRST": first is not None}
    if first is not None:
        extra["first_ptr"] = first
    x, end = _run(a, _packed(dh_BTN), _state(dfinal_SN, h_BTN.dtype), cu, extra, segment)
    carry = torch.view_as_complex(end) if h_BTN.is_complex() else end
    gate = a_BTN.flatten(0, 1)[cu[:-1].clamp(max=a.shape[0] - 1)].to(carry.dtype).conj()
    dh0 = torch.where((cu[1:] > cu[:-1])[:, None], gate * carry, dfinal_SN.to(carry.dtype))
    return _back(da, a_BTN), _back(x, h_BTN), dh0
