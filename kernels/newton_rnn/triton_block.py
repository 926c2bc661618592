"""ParaRNN cells with a matrix per head in Triton: one program per sequence and head, Newton's iteration in one launch.

As `triton`, with the derivative of a chunk's end by its start a D x D matrix per row: D unit tangents walked along with
the states, as the rows of one product. Corrections go from chunk to chunk in order: few chunks, small matrices.

Packed rows [T, 3, H * D]; states [S, P, H * D] with P = 1 (h) or 2 (c, h); everything in float32 on the chip.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl

from kernels.newton_rnn.triton_cells import down, gaps, gates, inputs, load_state, only, peepholes, store_state
from kernels.sequential_rnn.triton_cells import matrix


@triton.jit
def derivative(c, h, g0, g1, k, th, p0, p1, LSTM: tl.constexpr):
    """Five planes of a step from what `gates` returned: all that its derivative needs beside the matrices."""
    if LSTM:
        forget, out = (c - k) * g0 * (1 - g0), th * g1 * (1 - g1)
        return g0 + p0 * forget, forget, (1 - g0) * (1 - k * k), g1 * (1 - th * th) + p1 * out, out
    else:
        return 1 - g0, (k - h) * g0 * (1 - g0), g0 * (1 - k * k), g1, h * g1 * (1 - g1)


@triton.jit
def spread(x, ROWS: tl.constexpr, BD: tl.constexpr):
    """Every row BD times, for its BD tangents."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [ROWS, BD, BD]), [ROWS * BD, BD])


@triton.jit
def units(ROWS: tl.constexpr, BD: tl.constexpr):
    """The unit tangents of every row."""
    d = tl.arange(0, BD)
    return spread(tl.zeros([ROWS, BD], tl.float32), ROWS, BD) + (
        (tl.arange(0, ROWS * BD) % BD)[:, None] == d[None, :]
    ).to(tl.float32)


@triton.jit
def along(tangents, v, row, ROWS: tl.constexpr, BD: tl.constexpr):
    """The map of one row, of which `tangents` are the columns, applied to v."""
    stacked = tl.reshape(tangents, [ROWS, BD, BD])
    columns = tl.sum(tl.where((tl.arange(0, ROWS) == row)[:, None, None], stacked, 0.0), 0)
    return tl.sum(columns * v[:, None], 0)


@triton.jit
def _push(pc, ph, a, b, c, d, e, r0, r1, r2, LSTM: tl.constexpr, PREC: tl.constexpr):
    """Tangents over a step."""
    if LSTM:
        pc = a * pc + b * tl.dot(ph, r0, input_precision=PREC) + c * tl.dot(ph, r2, input_precision=PREC)
        return pc, d * pc + e * tl.dot(ph, r1, input_precision=PREC)
    else:
        inner = d * ph + e * tl.dot(ph, r1, input_precision=PREC)
        ph = a * ph + b * tl.dot(ph, r0, input_precision=PREC) + c * tl.dot(inner, r2, input_precision=PREC)
        return pc, ph


@triton.jit
def _walk(
    x_ptr,
    reset_ptr,
    t,
    end,
    n,
    live,
    N,
    c,
    h,
    r0,
    r1,
    r2,
    p0,
    p1,
    LSTM: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """One step of every row: whether there is a token, the state before it, and the cell."""
    token = (t < end)[:, None]
    x0, x1, x2 = inputs(x_ptr, t[:, None], n[None, :], N, token & live[None, :])
    if HAS_RESET:
        keep = (tl.load(reset_ptr + t, mask=t < end, other=0) == 0)[:, None]
        h = tl.where(keep, h, 0.0)
        c = tl.where(keep, c, 0.0)
    c_new, h_new, g0, g1, k, th = gates(x0, x1, x2, c, h, r0, r1, r2, p0, p1, LSTM, True)
    return token, c, h, tl.where(token, c_new, c), tl.where(token, h_new, h), g0, g1, k, th


@triton.jit
def newton_block_walk(
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
    N,
    D,
    LSTM: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_PEEPHOLE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    PREC: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """As `newton_walk`."""
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    d = tl.arange(0, BD)
    n, live = head * D + d, d < D
    j = tl.arange(0, ROWS)
    first = (j == 0)[:, None]
    row_of = tl.arange(0, ROWS * BD) // BD
    bos, eos, line = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1), tl.load(first_ptr + s)
    r0 = matrix(r_ptr, 0, head, heads, D, BD)
    r1 = matrix(r_ptr, 1, head, heads, D, BD)
    r2 = matrix(r_ptr, 2, head, heads, D, BD)
    p0, p1 = peepholes(p_ptr, n, N, live, HAS_PEEPHOLE)
    p0, p1 = p0[None, :], p1[None, :]
    carry_h = tl.zeros([BD], tl.float32)
    carry_c = tl.zeros([BD], tl.float32)
    if HAS_START:
        carry_c, carry_h = load_state(h0_ptr, s, n, live, N, LSTM)
    for t0 in range(bos, eos, ROWS * C):
        residual = tl.full([], float("inf"), tl.float32)
        count = tl.full([], -1, tl.int32)
        solved = tl.full([], 0, tl.int32)
        last = (tl.minimum(eos - t0, ROWS * C) - 1) // C
        inner = ((j > 0) & (t0 + j * C < eos))[:, None]
        if MOST > 0:
            count = tl.full([], 0, tl.int32)
            h = tl.where(first, carry_h[None, :], 0.0)
            c = tl.where(first, carry_c[None, :], 0.0)
            for i in range(0, C):
                _t, _c, _h, c, h, _0, _1, _2, _3 = _walk(
                    x_ptr, reset_ptr, t0 + j * C + i, eos, n, live, N, c, h, r0, r1, r2, p0, p1, LSTM, HAS_RESET
                )
            start_h = tl.where(first, carry_h[None, :], down(h, ROWS, BD))
            start_c = tl.where(first, carry_c[None, :], down(c, ROWS, BD))
            going = 1
            while going > 0:
                h = start_h
                c = start_c
                # tangents: hh, and for the LSTM hc (of h by c), ch, cc
                hh = units(ROWS, BD)
                cc = units(ROWS, BD)
                hc = tl.zeros([ROWS * BD, BD], tl.float32)
                ch = tl.zeros([ROWS * BD, BD], tl.float32)
                for i in range(0, C):
                    t = t0 + j * C + i
                    token, c0, h0, c, h, g0, g1, k, th = _walk(
                        x_ptr, reset_ptr, t, eos, n, live, N, c, h, r0, r1, r2, p0, p1, LSTM, HAS_RESET
                    )
                    inside = token & live[None, :]
                    tl.store(h_ptr + t[:, None] * N + n[None, :], h, mask=inside)
                    a, b, e, f, g = derivative(c0, h0, g0, g1, k, th, p0, p1, LSTM)
                    a, b, e = spread(a, ROWS, BD), spread(b, ROWS, BD), spread(e, ROWS, BD)
                    f, g = spread(f, ROWS, BD), spread(g, ROWS, BD)
                    mine = t0 + row_of * C + i
                    moves = (mine < eos)[:, None]
                    if HAS_RESET:
                        kept = (tl.load(reset_ptr + mine, mask=mine < eos, other=0) == 0)[:, None]
                        hh = tl.where(kept, hh, 0.0)
                        if LSTM:
                            hc, ch, cc = tl.where(kept, hc, 0.0), tl.where(kept, ch, 0.0), tl.where(kept, cc, 0.0)
                    if LSTM:
                        tl.store(c_ptr + t[:, None] * N + n[None, :], c, mask=inside)
                        cc_new, hc_new = _push(cc, hc, a, b, e, f, g, r0, r1, r2, LSTM, PREC)
                        cc, hc = tl.where(moves, cc_new, cc), tl.where(moves, hc_new, hc)
                    ch_new, hh_new = _push(ch, hh, a, b, e, f, g, r0, r1, r2, LSTM, PREC)
                    ch, hh = tl.where(moves, ch_new, ch), tl.where(moves, hh_new, hh)
                gap_c, gap_h, residual = gaps(c, h, start_c, start_h, inner, ROWS, BD, LSTM)
                if residual <= tolerance:
                    solved = tl.full([], 1, tl.int32)
                if (solved > 0) | (count >= MOST):
                    going = 0
                else:
                    count += 1
                    step_h = tl.zeros([BD], tl.float32)
                    step_c = tl.zeros([BD], tl.float32)
                    for place in range(1, ROWS):
                        to_h = only(gap_h, place, ROWS) + along(hh, step_h, place - 1, ROWS, BD)
                        if LSTM:
                            to_h += along(hc, step_c, place - 1, ROWS, BD)
                            step_c = along(cc, step_c, place - 1, ROWS, BD) + along(ch, step_h, place - 1, ROWS, BD)
                            step_c += only(gap_c, place, ROWS)
                            start_c += tl.where((inner & (j == place)[:, None]), step_c[None, :], 0.0)
                        step_h = to_h
                        start_h += tl.where((inner & (j == place)[:, None]), step_h[None, :], 0.0)
            if solved > 0:
                carry_h = only(h, last, ROWS)
                carry_c = only(c, last, ROWS)
        if solved == 0:
            # other threads than before write these states now; every row walks the same tokens
            tl.debug_barrier()
            h = tl.zeros([ROWS, BD], tl.float32) + carry_h[None, :]
            c = tl.zeros([ROWS, BD], tl.float32) + carry_c[None, :]
            for t1 in range(t0, tl.minimum(t0 + ROWS * C, eos)):
                t = t1 + 0 * j
                _t, _c, _h, c, h, _0, _1, _2, _3 = _walk(
                    x_ptr, reset_ptr, t, eos, n, live, N, c, h, r0, r1, r2, p0, p1, LSTM, HAS_RESET
                )
                tl.store(h_ptr + t[:, None] * N + n[None, :], h, mask=first & live[None, :])
                if LSTM:
                    tl.store(c_ptr + t[:, None] * N + n[None, :], c, mask=first & live[None, :])
            carry_h = only(h, 0, ROWS)
            carry_c = only(c, 0, ROWS)
        tl.store(count_ptr + line * heads + head, count)
        tl.store(residual_ptr + line * heads + head, residual)
        line += 1
    store_state(final_ptr, carry_c, carry_h, s, n, live, N, LSTM)
