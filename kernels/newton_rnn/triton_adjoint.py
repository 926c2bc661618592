"""The backward of the ParaRNN cells in Triton: one linear solve, in one launch.

The shape of the forward walk without its iteration: a walk for each chunk's transposed map, an associative scan, a walk
from the right ends that writes the gradients. Weight gradients come as one sum per sequence: no atomics.

Packed rows [T, 3, N]; states [S, P, N] with P = 1 (h) or 2 (c, h); everything in float32 on the chip.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl

from kernels.newton_rnn.triton_cells import combine, combine_pair, down, gates, inputs, load_state, store_state, weights


@triton.jit
def _before(state_ptr, h0_ptr, s, part, t, bos, n, N, mask, P: tl.constexpr, HAS_START: tl.constexpr):
    """The state a token started from: of the token before, or the initial one."""
    x = tl.load(state_ptr + (t - 1) * N + n, mask=mask & (t > bos), other=0.0)
    if HAS_START:
        x += tl.load(h0_ptr + (s * P + part) * N + n + t * 0, mask=mask & (t == bos), other=0.0)
    return x


@triton.jit
def _planes(
    x_ptr,
    h_ptr,
    c_ptr,
    h0_ptr,
    reset_ptr,
    s,
    t,
    bos,
    n,
    N,
    token,
    inside,
    r0,
    r1,
    r2,
    p0,
    p1,
    LSTM: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """What the adjoint of the tokens t needs: the states before, the derivatives, and the transposed Jacobian."""
    P: tl.constexpr = 2 if LSTM else 1
    x0, x1, x2 = inputs(x_ptr, t, n, N, inside)
    h = _before(h_ptr, h0_ptr, s, P - 1, t, bos, n, N, inside, P, HAS_START)
    c = h
    if LSTM:
        c = _before(c_ptr, h0_ptr, s, 0, t, bos, n, N, inside, P, HAS_START)
    keep = token
    if HAS_RESET:
        keep = tl.load(reset_ptr + t, mask=token, other=0) == 0
        h = tl.where(keep, h, 0.0)
        c = tl.where(keep, c, 0.0)
    c_new, _h, g0, g1, k, th = gates(x0, x1, x2, c, h, r0, r1, r2, p0, p1, LSTM)
    if LSTM:
        e0 = (c - k) * g0 * (1 - g0)
        e1 = th * g1 * (1 - g1)
        e2 = (1 - g0) * (1 - k * k)
        into = g1 * (1 - th * th) + p1 * e1
        cc = g0 + p0 * e0
        cross = r0 * e0 + r2 * e2
        return h, c, c_new, e0, e1, e2, into, cc, cc * into, cross, cross * into + r1 * e1, keep
    else:
        e0 = (k - h) * g0 * (1 - g0)
        e2 = g0 * (1 - k * k)
        e1 = e2 * r2 * h * g1 * (1 - g1)
        hh = (1 - g0) + e0 * r0 + e1 * r1 + e2 * r2 * g1
        return h, g1 * h, c_new, e0, e1, e2, c, hh, hh, hh, hh, keep


@triton.jit
def newton_adjoint(
    x_ptr,
    r_ptr,
    p_ptr,
    h0_ptr,
    reset_ptr,
    cu_ptr,
    h_ptr,
    c_ptr,
    dh_ptr,
    dfinal_ptr,
    dx_ptr,
    dh0_ptr,
    dr_ptr,
    N,
    LSTM: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_PEEPHOLE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    """dx [T, 3, N], dh0 [S, P, N] and one sum of weight gradients per sequence, dr [S, 5, N] (3 gates, 2 peepholes).

    Rows are chunks in reversed order: row 0 is the last chunk of the block. M is the transposed Jacobian of a step
    (cc: of c from c, ch: c from h, hc, hh); w the adjoint that leaves a step towards the past.
    """
    s = tl.program_id(0).to(tl.int64)
    n1 = tl.program_id(1) * BN + tl.arange(0, BN)
    live = n1 < N
    n = n1[None, :]
    j = ROWS - 1 - tl.arange(0, ROWS)
    top = (j == ROWS - 1)[:, None]
    bos = tl.load(cu_ptr + s)
    eos = tl.load(cu_ptr + s + 1)
    r0, r1, r2, p0, p1 = weights(r_ptr, p_ptr, n1, N, live, HAS_PEEPHOLE)
    r0, r1, r2, p0, p1 = r0[None, :], r1[None, :], r2[None, :], p0[None, :], p1[None, :]
    carry_c, carry_h = load_state(dfinal_ptr, s, n1, live, N, LSTM)
    d0 = tl.zeros([ROWS, BN], tl.float32)
    d1 = tl.zeros([ROWS, BN], tl.float32)
    d2 = tl.zeros([ROWS, BN], tl.float32)
    d3 = tl.zeros([ROWS, BN], tl.float32)
    d4 = tl.zeros([ROWS, BN], tl.float32)
    blocks = (eos - bos + ROWS * C - 1) // (ROWS * C)
    for b in range(0, blocks):
        t0 = bos + (blocks - 1 - b) * ROWS * C
        wh = tl.zeros([ROWS, BN], tl.float32)
        wc = tl.zeros([ROWS, BN], tl.float32)
        hh = tl.full([ROWS, BN], 1.0, tl.float32)
        hc = tl.zeros([ROWS, BN], tl.float32)
        ch = tl.zeros([ROWS, BN], tl.float32)
        cc = tl.full([ROWS, BN], 1.0, tl.float32)
        for i in range(0, C):
            t = (t0 + j * C + (C - 1 - i))[:, None]
            token = t < eos
            inside = token & live[None, :]
            _h, _c, _n, _0, _1, _2, _i, m_cc, m_ch, m_hc, m_hh, keep = _planes(
                x_ptr, h_ptr, c_ptr, h0_ptr, reset_ptr, s, t, bos, n, N, token, inside, r0, r1, r2, p0, p1,
                LSTM, HAS_START, HAS_RESET,
            )  # fmt: skip
            uh = wh + tl.load(dh_ptr + t * N + n, mask=inside, other=0.0)
            if LSTM:
                nc, nh = m_cc * wc + m_ch * uh, m_hc * wc + m_hh * uh
                n_cc, n_ch = m_cc * cc + m_ch * hc, m_cc * ch + m_ch * hh
                n_hc, n_hh = m_hc * cc + m_hh * hc, m_hc * ch + m_hh * hh
                wc = tl.where(token, tl.where(keep, nc, 0.0), wc)
                cc = tl.where(token, tl.where(keep, n_cc, 0.0), cc)
                ch = tl.where(token, tl.where(keep, n_ch, 0.0), ch)
                hc = tl.where(token, tl.where(keep, n_hc, 0.0), hc)
            else:
                nh, n_hh = m_hh * uh, m_hh * hh
            wh = tl.where(token, tl.where(keep, nh, 0.0), wh)
            hh = tl.where(token, tl.where(keep, n_hh, 0.0), hh)
        # what leaves every chunk, given what enters the block
        if LSTM:
            cc, ch, hc, hh, wc, wh = tl.associative_scan((cc, ch, hc, hh, wc, wh), 0, combine_pair)
            out_c = cc * carry_c[None, :] + ch * carry_h[None, :] + wc
            out_h = hc * carry_c[None, :] + hh * carry_h[None, :] + wh
        else:
            hh, wh = tl.associative_scan((hh, wh), 0, combine)
            out_c = wc
            out_h = hh * carry_h[None, :] + wh
        wh = tl.where(top, carry_h[None, :], down(out_h, ROWS, BN))
        wc = tl.where(top, carry_c[None, :], down(out_c, ROWS, BN))
        carry_h = tl.sum(tl.where((j == 0)[:, None], out_h, 0.0), 0)
        carry_c = tl.sum(tl.where((j == 0)[:, None], out_c, 0.0), 0)
        for i in range(0, C):
            t = (t0 + j * C + (C - 1 - i))[:, None]
            token = t < eos
            inside = token & live[None, :]
            h, c, c_new, e0, e1, e2, into, m_cc, m_ch, m_hc, m_hh, keep = _planes(
                x_ptr, h_ptr, c_ptr, h0_ptr, reset_ptr, s, t, bos, n, N, token, inside, r0, r1, r2, p0, p1,
                LSTM, HAS_START, HAS_RESET,
            )  # fmt: skip
            uh = wh + tl.load(dh_ptr + t * N + n, mask=inside, other=0.0)
            if LSTM:
                total = wc + into * uh
                x0, x1, x2 = total * e0, uh * e1, total * e2
                d3 += tl.where(inside, x0 * c, 0.0)
                d4 += tl.where(inside, x1 * c_new, 0.0)
                d2 += tl.where(inside, x2 * h, 0.0)
                nc, nh = m_cc * wc + m_ch * uh, m_hc * wc + m_hh * uh
                wc = tl.where(token, tl.where(keep, nc, 0.0), wc)
            else:
                x0, x1, x2 = uh * e0, uh * e1, uh * e2
                d2 += tl.where(inside, x2 * c, 0.0)
                nh = m_hh * uh
            d0 += tl.where(inside, x0 * h, 0.0)
            d1 += tl.where(inside, x1 * h, 0.0)
            wh = tl.where(token, tl.where(keep, nh, 0.0), wh)
            at = dx_ptr + t * 3 * N + n
            tl.store(at, x0, mask=inside)
            tl.store(at + N, x1, mask=inside)
            tl.store(at + 2 * N, x2, mask=inside)
    store_state(dh0_ptr, carry_c, carry_h, s, n1, live, N, LSTM)
    at = dr_ptr + s * 5 * N + n1
    tl.store(at, tl.sum(d0, 0), mask=live)
    tl.store(at + N, tl.sum(d1, 0), mask=live)
    tl.store(at + 2 * N, tl.sum(d2, 0), mask=live)
    tl.store(at + 3 * N, tl.sum(d3, 0), mask=live)
    tl.store(at + 4 * N, tl.sum(d4, 0), mask=live)
