"""Device functions that Triton kernels share: tiles, states, gates, decays.

Tensors are packed [T, H, D]; a gate tile is [C, 1] (one decay per head) or [C, BK] (per channel).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Of float32, without the device library: the sigmoid form loses what is near zero, where a polynomial has it."""
    s = x * x
    small = x + x * s * (-1.0 / 3 + s * (2.0 / 15 - s * (17.0 / 315)))
    return tl.where(s < 0.04, small, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def chunk_bounds(line, s, cu_ptr, first_ptr, C: tl.constexpr):
    """First token of the chunk that has this row of the chunk table in sequence s, and the one after its last."""
    t0 = tl.load(cu_ptr + s) + (line - tl.load(first_ptr + s)) * C
    return t0, tl.minimum(t0 + C, tl.load(cu_ptr + s + 1))


@triton.jit
def load_tile(ptr, t0, end, h, H, D, d0, C: tl.constexpr, BD: tl.constexpr):
    """Tokens t0 .. t0+C of head h, columns d0 .. d0+BD; zeros outside."""
    t = t0 + tl.arange(0, C)
    d = d0 + tl.arange(0, BD)
    return tl.load(ptr + (t[:, None] * H + h) * D + d[None, :], mask=(t < end)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, x, t0, end, h, H, D, d0, C: tl.constexpr, BD: tl.constexpr):
    """Counterpart of `load_tile`."""
    t = t0 + tl.arange(0, C)
    d = d0 + tl.arange(0, BD)
    tl.store(ptr + (t[:, None] * H + h) * D + d[None, :], x, mask=(t < end)[:, None] & (d < D)[None, :])


@triton.jit
def row_scale(ptr, t0, end, h, H, D, NORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """1 / sqrt(|x|^2 + 1e-6) of every token's row over all of D; ones when not NORM."""
    squares = tl.zeros([C], tl.float32)
    if NORM:
        for d0 in range(0, D, BD):
            x = load_tile(ptr, t0, end, h, H, D, d0, C, BD).to(tl.float32)
            squares += tl.sum(x * x, 1)
        squares = tl.rsqrt(squares + 1e-6)
    else:
        squares += 1.0
    return squares


@triton.jit
def load_unit(ptr, scale, t0, end, h, H, D, d0, NORM: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """`load_tile`, its rows brought to length 1 by `scale` from `row_scale` when NORM."""
    x = load_tile(ptr, t0, end, h, H, D, d0, C, BD)
    if NORM:
        x = (x * scale[:, None]).to(x.dtype)
    return x


@triton.jit
def load_state(ptr, row, h, H, K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Tile of the state [rows, H, K, V]; zeros outside."""
    k = k0 + tl.arange(0, BK)
    v = v0 + tl.arange(0, BV)
    at = ((row.to(tl.int64) * H + h) * K + k[:, None]) * V + v[None, :]
    return tl.load(ptr + at, mask=(k < K)[:, None] & (v < V)[None, :], other=0.0)


@triton.jit
def store_state(ptr, x, row, h, H, K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Counterpart of `load_state`."""
    k = k0 + tl.arange(0, BK)
    v = v0 + tl.arange(0, BV)
    at = ((row.to(tl.int64) * H + h) * K + k[:, None]) * V + v[None, :]
    tl.store(ptr + at, x, mask=(k < K)[:, None] & (v < V)[None, :])


# e to the power of it is zero in float32
WIPED = tl.constexpr(-105.0)


@triton.jit
def load_gate(
    g_ptr, t0, end, h, H, K, k0, HAS_GATE: tl.constexpr, CHANNEL: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):
    """Log decays of tokens t0 .. t0+C; zero where there is no token, no channel, no gate.

    Those that wipe a state are cut to where e^g is just zero: as long as it stands in a running sum, a large one takes
    the digits of the gates behind it, and -inf makes them NaN.
    """
    t = t0 + tl.arange(0, C)
    if CHANNEL:
        k = k0 + tl.arange(0, BK)
        at = (t[:, None] * H + h) * K + k[None, :]
        g = tl.load(g_ptr + at, mask=(t < end)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    elif HAS_GATE:
        g = tl.load(g_ptr + (t * H + h)[:, None], mask=(t < end)[:, None], other=0.0).to(tl.float32)
    else:
        g = tl.zeros([C, 1], tl.float32)
    return tl.where(g < WIPED, WIPED, g)


# 3.6 fails on the scan of a single column; as a vector it costs later versions registers
COLUMN_SCANS = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7))


@triton.jit
def running(g, CHANNEL: tl.constexpr, REVERSE: tl.constexpr):
    """Inclusive running sum of a gate tile over time."""
    if CHANNEL or COLUMN_SCANS:
        total = tl.cumsum(g, 0, reverse=REVERSE)
    else:
        total = tl.cumsum(tl.sum(g, 1), 0, reverse=REVERSE)[:, None]
    return total


@triton.jit
def decay_mask(g, STRICT: tl.constexpr, C: tl.constexpr):
    """L[i, j] = exp(sum of g over (j, i]), zero above the diagonal; for one decay per head."""
    i = tl.arange(0, C)
    run = tl.cumsum(tl.sum(g, 1), 0)
    below = i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]
    return tl.where(below, tl.exp(tl.where(below, run[:, None] - run[None, :], 0.0)), 0.0)


@triton.jit
def level_map(width, C: tl.constexpr):
    """Halving level of the triangle: second-half flag, block number, and the 0/1 matrix of interval sums."""
    i = tl.arange(0, C)
    block = i // (2 * width)
    middle = block * (2 * width) + width
    second = i >= middle
    s = i[None, :]
    after = second[:, None] & (s >= middle[:, None]) & (s <= i[:, None])
    before = (i < middle)[:, None] & (s > i[:, None]) & (s < middle[:, None])
    return second, block, (after | before).to(tl.float32)


@triton.jit
def channel_scores(q, k, g, STRICT: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """Decayed scores for a decay per channel: squares of halves, every exponent <= 0 (see common/channel_decay.py)."""
    i = tl.arange(0, C)
    p = tl.zeros([C, C], tl.float32)
    if not STRICT:
        p += tl.where(i[:, None] == i[None, :], tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None], 0.0)
    # a loop at run time: unrolled, all levels live in registers at once and spill
    width = 1
    for _ in range(LEVELS):
        second, block, interval = level_map(width, C)
        f = tl.exp(tl.dot(interval, g, input_precision=PREC))
        qs = tl.where(second[:, None], q * f, 0.0).to(q.dtype)
        ks = tl.where(second[:, None], 0.0, k * f).to(k.dtype)
        p += tl.where(block[:, None] == block[None, :], tl.dot(qs, tl.trans(ks), input_precision=PREC), 0.0)
        width *= 2
    return p


@triton.jit
def channel_scores_backward(
    q, k, g, dp, STRICT: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr
):
    """Gradients of q, k and g of `channel_scores`."""
    i = tl.arange(0, C)
    dq = tl.zeros(q.shape, tl.float32)
    dk = tl.zeros(q.shape, tl.float32)
    dg = tl.zeros(q.shape, tl.float32)
    if not STRICT:
        diagonal = tl.sum(tl.where(i[:, None] == i[None, :], dp, 0.0), 1)[:, None]
        dq += diagonal * k
        dk += diagonal * q
    # a loop at run time: unrolled, all levels live in registers at once and spill
    width = 1
    for _ in range(LEVELS):
        second, block, interval = level_map(width, C)
        f = tl.exp(tl.dot(interval, g, input_precision=PREC))
        qs = tl.where(second[:, None], q * f, 0.0)
        ks = tl.where(second[:, None], 0.0, k * f)
        square = (block[:, None] == block[None, :]) & second[:, None] & (second[None, :] == 0)
        d = tl.where(square, dp, 0.0).to(q.dtype)
        dqs = tl.dot(d, ks.to(k.dtype), input_precision=PREC)
        dks = tl.dot(tl.trans(d), qs.to(q.dtype), input_precision=PREC)
        dq += dqs * f
        dk += dks * f
        dg += tl.dot(tl.trans(interval), qs * dqs + ks * dks, input_precision=PREC)
        width *= 2
    return dq, dk, dg


@triton.jit
def mask_gradient(m, C: tl.constexpr):
    """dg[s] = sum of m[i, j] over i >= s > j: the gate gradient through `decay_mask`."""
    i = tl.arange(0, C)
    m = tl.where(i[:, None] > i[None, :], m, 0.0)
    before = tl.cumsum(m, 1) - m
    return tl.sum(tl.where(i[:, None] >= i[None, :], before, 0.0), 0)
