"""Device functions of the ParaRNN cells: the cell itself, its weights, and the maps that scans combine.

Packed rows [T, 3, N]; everything in float32 on the chip.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl

from kernels.common.triton_device import tanh


@triton.jit
def combine(a1, u1, a2, u2):
    """First (a1, u1), then (a2, u2), as maps h -> a h + u."""
    return a1 * a2, a2 * u1 + u2


@triton.jit
def combine_pair(a1, b1, c1, d1, u1, v1, a2, b2, c2, d2, u2, v2):
    """The same for two states: matrix [[a, b], [c, d]], offset (u, v)."""
    return (
        a2 * a1 + b2 * c1,
        a2 * b1 + b2 * d1,
        c2 * a1 + d2 * c1,
        c2 * b1 + d2 * d1,
        a2 * u1 + b2 * v1 + u2,
        c2 * u1 + d2 * v1 + v2,
    )


@triton.jit
def down(x, ROWS: tl.constexpr, BN: tl.constexpr):
    """Every row takes the value of the row before it (row 0 its own)."""
    j = tl.arange(0, ROWS)
    return tl.gather(x, tl.broadcast_to(tl.maximum(j - 1, 0)[:, None], [ROWS, BN]), 0)


@triton.jit
def gaps(c, h, start_c, start_h, inner, ROWS: tl.constexpr, BN: tl.constexpr, LSTM: tl.constexpr):
    """What every chunk's start misses of the end before it (c, h), and the largest miss relative to the largest end."""
    gap_h = tl.where(inner, down(h, ROWS, BN) - start_h, 0.0)
    # a maximum may step over NaN: count it as infinite
    wide = tl.abs(tl.where(gap_h == gap_h, gap_h, float("inf")))
    size = tl.abs(h)
    gap_c = tl.zeros([ROWS, BN], tl.float32)
    if LSTM:
        gap_c = tl.where(inner, down(c, ROWS, BN) - start_c, 0.0)
        wide = tl.maximum(wide, tl.abs(tl.where(gap_c == gap_c, gap_c, float("inf"))))
        size = tl.maximum(size, tl.abs(c))
    return gap_c, gap_h, tl.max(tl.max(wide, 1), 0) / tl.maximum(tl.max(tl.max(size, 1), 0), 1e-30)


@triton.jit
def inputs(x_ptr, t, n, N, mask):
    """The three gate inputs of tokens t and units n."""
    at = t * 3 * N + n
    x0 = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + at + N, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + 2 * N, mask=mask, other=0.0).to(tl.float32)
    return x0, x1, x2


@triton.jit
def load_state(ptr, s, n, live, N, LSTM: tl.constexpr):
    """Units n of the state of a sequence: c (zeros for the GRU) and h."""
    P: tl.constexpr = 2 if LSTM else 1
    c = tl.zeros(n.shape, tl.float32)
    if LSTM:
        c = tl.load(ptr + s * P * N + n, mask=live, other=0.0)
    return c, tl.load(ptr + (s * P + P - 1) * N + n, mask=live, other=0.0)


@triton.jit
def store_state(ptr, c, h, s, n, live, N, LSTM: tl.constexpr):
    """Inverse of `load_state`."""
    P: tl.constexpr = 2 if LSTM else 1
    tl.store(ptr + (s * P + P - 1) * N + n, h, mask=live)
    if LSTM:
        tl.store(ptr + s * P * N + n, c, mask=live)


@triton.jit
def only(x, row, ROWS: tl.constexpr):
    """One row."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == row)[:, None], x, 0.0), 0)


@triton.jit
def _times(v, r, BLOCK: tl.constexpr):
    """v R, with a weight per unit or (BLOCK) a matrix."""
    if BLOCK:
        return tl.dot(v, r, input_precision="ieee")
    else:
        return r * v


@triton.jit
def gates(x0, x1, x2, c, h, r0, r1, r2, p0, p1, LSTM: tl.constexpr, BLOCK: tl.constexpr = False):
    """The cell: next c and h, and its inner values (gru: z, s, candidate; lstm: f, o, candidate, tanh c')."""
    if LSTM:
        f = tl.sigmoid(x0 + _times(h, r0, BLOCK) + p0 * c)
        z = tanh(x2 + _times(h, r2, BLOCK))
        c_new = z + f * (c - z)
        o = tl.sigmoid(x1 + _times(h, r1, BLOCK) + p1 * c_new)
        th = tanh(c_new)
        return c_new, o * th, f, o, z, th
    else:
        z = tl.sigmoid(x0 + _times(h, r0, BLOCK))
        s = tl.sigmoid(x1 + _times(h, r1, BLOCK))
        k = tanh(x2 + _times(s * h, r2, BLOCK))
        return c, h + z * (k - h), z, s, k, h


@triton.jit
def peepholes(p_ptr, n, N, live, HAS_PEEPHOLE: tl.constexpr):
    """Both peepholes, zero where there are none."""
    p0 = tl.zeros(n.shape, tl.float32)
    p1 = tl.zeros(n.shape, tl.float32)
    if HAS_PEEPHOLE:
        p0 = tl.load(p_ptr + n, mask=live, other=0.0)
        p1 = tl.load(p_ptr + N + n, mask=live, other=0.0)
    return p0, p1


@triton.jit
def weights(r_ptr, p_ptr, n, N, live, HAS_PEEPHOLE: tl.constexpr):
    """Recurrent weights of the three gates, one per unit, and peepholes."""
    r0 = tl.load(r_ptr + n, mask=live, other=0.0)
    r1 = tl.load(r_ptr + N + n, mask=live, other=0.0)
    r2 = tl.load(r_ptr + 2 * N + n, mask=live, other=0.0)
    p0, p1 = peepholes(p_ptr, n, N, live, HAS_PEEPHOLE)
    return r0, r1, r2, p0, p1
