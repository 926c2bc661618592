"""ParaRNN cells in Triton: one program per sequence and tile of units, the whole Newton iteration in one launch.

A block of time is ROWS chunks of C steps: the rows of a tile are chunks, walked side by side; starts are corrected by
an associative scan over the rows (2x2 blocks for the LSTM). Walks write the states as they go, so the last one is the
result; a block whose gap stays above the tolerance is walked again token by token.

Packed rows [T, 3, N]; states [S, P, N] with P = 1 (h) or 2 (c, h); everything in float32 on the chip.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl

from kernels.newton_rnn.triton_cells import (
    combine,
    combine_pair,
    down,
    gaps,
    gates,
    inputs,
    load_state,
    store_state,
    weights,
)


@triton.jit
def newton_walk(
    x_ptr,
    r_ptr,
    p_ptr,
    h0_ptr,
    reset_ptr,
    cu_ptr,
    first_ptr,
    h_ptr,
    c_ptr,
    final_ptr,
    count_ptr,
    residual_ptr,
    tolerance,
    MOST,
    TILES,
    N,
    LSTM: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_PEEPHOLE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    """States of one sequence and tile of units; per block of time the counted iterations and the residual left."""
    s = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    live = n < N
    j = tl.arange(0, ROWS)
    bos = tl.load(cu_ptr + s)
    eos = tl.load(cu_ptr + s + 1)
    line = tl.load(first_ptr + s)
    r0, r1, r2, p0, p1 = weights(r_ptr, p_ptr, n, N, live, HAS_PEEPHOLE)
    carry_h = tl.zeros([BN], tl.float32)
    carry_c = tl.zeros([BN], tl.float32)
    if HAS_START:
        carry_c, carry_h = load_state(h0_ptr, s, n, live, N, LSTM)
    for t0 in range(bos, eos, ROWS * C):
        residual = tl.full([], float("inf"), tl.float32)
        count = tl.full([], -1, tl.int32)
        solved = tl.full([], 0, tl.int32)
        # the row of the block's last token, whose end is the block's
        last = (tl.minimum(eos - t0, ROWS * C) - 1) // C
        inner = ((j > 0) & (t0 + j * C < eos))[:, None]
        if MOST > 0:
            count = tl.full([], 0, tl.int32)
            h = tl.where((j == 0)[:, None], carry_h[None, :], 0.0)
            c = tl.where((j == 0)[:, None], carry_c[None, :], 0.0)
            for i in range(0, C):
                t = t0 + j * C + i
                token = t < eos
                x0, x1, x2 = inputs(x_ptr, t[:, None], n[None, :], N, token[:, None] & live[None, :])
                if HAS_RESET:
                    keep = tl.load(reset_ptr + t, mask=token, other=0) == 0
                    h = tl.where(keep[:, None], h, 0.0)
                    c = tl.where(keep[:, None], c, 0.0)
                c_new, h_new, _a, _b, _k, _d = gates(
                    x0, x1, x2, c, h, r0[None, :], r1[None, :], r2[None, :], p0[None, :], p1[None, :], LSTM
                )
                h = tl.where(token[:, None], h_new, h)
                c = tl.where(token[:, None], c_new, c)
            start_h = tl.where((j == 0)[:, None], carry_h[None, :], down(h, ROWS, BN))
            start_c = tl.where((j == 0)[:, None], carry_c[None, :], down(c, ROWS, BN))
            going = 1
            while going > 0:
                h = start_h
                c = start_c
                # the derivative of the ends by the starts: hh, and for the LSTM hc (of h by c), ch, cc
                hh = tl.full([ROWS, BN], 1.0, tl.float32)
                hc = tl.zeros([ROWS, BN], tl.float32)
                ch = tl.zeros([ROWS, BN], tl.float32)
                cc = tl.full([ROWS, BN], 1.0, tl.float32)
                for i in range(0, C):
                    t = t0 + j * C + i
                    token = t < eos
                    inside = token[:, None] & live[None, :]
                    x0, x1, x2 = inputs(x_ptr, t[:, None], n[None, :], N, inside)
                    if HAS_RESET:
                        keep = (tl.load(reset_ptr + t, mask=token, other=0) == 0)[:, None]
                        h = tl.where(keep, h, 0.0)
                        hh = tl.where(keep, hh, 0.0)
                        if LSTM:
                            c = tl.where(keep, c, 0.0)
                            hc = tl.where(keep, hc, 0.0)
                            ch = tl.where(keep, ch, 0.0)
                            cc = tl.where(keep, cc, 0.0)
                    c_new, h_new, g0, g1, k, th = gates(
                        x0, x1, x2, c, h, r0[None, :], r1[None, :], r2[None, :], p0[None, :], p1[None, :], LSTM
                    )
                    if LSTM:
                        from_c = g0 + (c - k) * g0 * (1 - g0) * p0[None, :]
                        from_h = (c - k) * g0 * (1 - g0) * r0[None, :] + (1 - g0) * (1 - k * k) * r2[None, :]
                        out_c = g1 * (1 - th * th) + th * g1 * (1 - g1) * p1[None, :]
                        out_h = th * g1 * (1 - g1) * r1[None, :]
                        cc_new = from_c * cc + from_h * hc
                        ch_new = from_c * ch + from_h * hh
                        hc = tl.where(token[:, None], out_c * cc_new + out_h * hc, hc)
                        hh = tl.where(token[:, None], out_c * ch_new + out_h * hh, hh)
                        cc = tl.where(token[:, None], cc_new, cc)
                        ch = tl.where(token[:, None], ch_new, ch)
                        c = tl.where(token[:, None], c_new, c)
                        tl.store(c_ptr + t[:, None] * N + n[None, :], c, mask=inside)
                    else:
                        d = (1 - g0) + (k - h) * g0 * (1 - g0) * r0[None, :]
                        d += g0 * (1 - k * k) * r2[None, :] * (g1 + h * g1 * (1 - g1) * r1[None, :])
                        hh = tl.where(token[:, None], d * hh, hh)
                    h = tl.where(token[:, None], h_new, h)
                    tl.store(h_ptr + t[:, None] * N + n[None, :], h, mask=inside)
                gap_c, gap_h, residual = gaps(c, h, start_c, start_h, inner, ROWS, BN, LSTM)
                if residual <= tolerance:
                    solved = tl.full([], 1, tl.int32)
                if (solved > 0) | (count >= MOST):
                    going = 0
                else:
                    count += 1
                    hh = tl.where(inner, down(hh, ROWS, BN), 0.0)
                    if LSTM:
                        hc = tl.where(inner, down(hc, ROWS, BN), 0.0)
                        ch = tl.where(inner, down(ch, ROWS, BN), 0.0)
                        cc = tl.where(inner, down(cc, ROWS, BN), 0.0)
                        _a, _b, _k, _d, gap_c, gap_h = tl.associative_scan(
                            (cc, ch, hc, hh, gap_c, gap_h), 0, combine_pair
                        )
                        start_c += gap_c
                    else:
                        _a, gap_h = tl.associative_scan((hh, gap_h), 0, combine)
                    start_h += gap_h
            if solved > 0:
                carry_h = tl.sum(tl.where((j == last)[:, None], h, 0.0), 0)
                carry_c = tl.sum(tl.where((j == last)[:, None], c, 0.0), 0)
        if solved == 0:
            # other threads than before write these states now
            tl.debug_barrier()
            for t in range(t0, tl.minimum(t0 + ROWS * C, eos)):
                x0, x1, x2 = inputs(x_ptr, t, n, N, live)
                if HAS_RESET:
                    keep = (tl.load(reset_ptr + t) == 0).to(tl.float32)
                    carry_h *= keep
                    carry_c *= keep
                carry_c, carry_h, _a, _b, _k, _d = gates(x0, x1, x2, carry_c, carry_h, r0, r1, r2, p0, p1, LSTM)
                tl.store(h_ptr + t * N + n, carry_h, mask=live)
                if LSTM:
                    tl.store(c_ptr + t * N + n, carry_c, mask=live)
        tl.store(count_ptr + line * TILES + tile, count)
        tl.store(residual_ptr + line * TILES + tile, residual)
        line += 1
    store_state(final_ptr, carry_c, carry_h, s, n, live, N, LSTM)
