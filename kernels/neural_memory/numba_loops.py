"""The loops of `numba.py`, first pass: one lane per sequence and head, piece after piece in its dual form.

All of a lane, weights, momentum and what a piece's tokens are on their way through the layers, stays in the nearer
caches, and nearly all work is products of small matrices. Tokens lie along rows: what belongs to a piece is [X, c], so
that a layer's matrix is the left factor of every product, as it is or transposed, which costs nothing; only what is
added to weights needs its right factor turned.

With F = [a_t q_t; b_t q_t; -c_ti (x_i . q_t)] and B = [W; P; e_i], a layer answers B^T F: W_t is a weighted sum of W, P
and the outer products x_i e_i of the piece. Behind the piece, with the coefficients of its last token, W' = a W + b P -
sum c_i x_i e_i and P' = d P - sum d_i x_i e_i.

Legend: as in `numba_room.py`; n of the c tokens of a piece are there, the others weigh nothing; S sequences, M pieces.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"
# numba compiles a function for the types that come, and gives an intrinsic its first argument

from kernels.common.numba import called, compiled, inner
from kernels.common.numba_product import move, product
from kernels.neural_memory.numba_parts import activated, bent, slope
from kernels.neural_memory.numba_room import (
    WIDE,
    WIDTH,
    cut,
    extent,
    given_back,
    layer,
    lower,
    made,
    numbers,
    of,
    place,
    stored,
    taken,
    turned,
    upper,
    vectors,
)

# layered: keys x and queries h before a layer, products z and o behind it; derivatives `SLOPE` and `BEND` of the
# activation at z; slopes e of the products, and g before the activation's derivative
X, H, Z, O, SLOPE, BEND, G, E = range(8)  # noqa: E741
# ends: values, and what a norm makes of the last product, then the answers
V, Y = range(2)
# gates: one over the norm's deviation, the gates, what tokens hold of what was before: of W and P in W_t, of P in P_t
INVERSE, STEP, DECAY, SLOWING, OF_W, OF_P, SLOWED = range(7)
# squares: of token i in W_t and in P_t, in row t; x_i . q_t, in row i
KEEP, SPEED, SCORES = range(3)
# factors: F, and what is pushed; states: two that take turns, and that of the chunk's start
ASKED, PUSHED = range(2)
START = 2
ROOM = (8, 2, 7, 3, 2, 3)


@called
def weigh(r, n):
    """The coefficients of a piece: zero where a token is not there."""
    one, keep, speed, gates = r.gates.dtype.type(1), r.squares[KEEP], r.squares[SPEED], r.gates
    a, b, d = one, one - one, one
    for t in range(r.c):
        gates[OF_W, t] = gates[OF_P, t] = gates[SLOWED, t] = 0
        for i in range(r.c):
            keep[t, i] = speed[t, i] = 0
        if t >= n:
            continue
        a *= gates[DECAY, t]
        gates[OF_W, t] = a
        for i in range(t):
            keep[t, i] = gates[DECAY, t] * keep[t - 1, i]
        keep[t, t] = one
        if r.kinds > 1:
            d *= gates[SLOWING, t]
            b = gates[DECAY, t] * b + d
            gates[OF_P, t], gates[SLOWED, t] = b, d
            for i in range(t):
                speed[t, i] = gates[SLOWING, t] * speed[t - 1, i]
                keep[t, i] += speed[t, i]
            speed[t, t] = one


@inner
def read(r, t0, n, h, tokens):
    """The tokens of a piece into their room."""
    q, k, v, steps, decays, slowings = tokens
    vectors(of(r, H, 0), q, t0, n, h)
    vectors(of(r, X, 0), k, t0, n, h)
    vectors(r.ends[V], v, t0, n, h)
    numbers(r.gates[STEP], steps, t0, n, h)
    numbers(r.gates[DECAY], decays, t0, n, h)
    numbers(r.gates[SLOWING], slowings, t0, n, h)
    weigh(r, n)


@inner
def surprised(r, z, z_at, start, start_at, norm, loss, threshold, has_norm):
    """From the products z of the keys the slopes of all layers."""
    layers = r.sizes.shape[1] - 2
    slope(
        of(r, E, layers), r.ends[Y], r.gates[INVERSE], place(r, z, z_at, layers), of(r, X, 0),
        r.ends[V], r.gates[STEP], norm, loss, threshold, has_norm,
    )  # fmt: skip
    for l in range(layers - 1, 0, -1):  # noqa: E741
        g, e, slopes = of(r, G, l), of(r, E, l), of(r, SLOPE, l)
        product(g, upper(layer(r, start, start_at, l), g.shape[0]), of(r, E, l + 1))
        for i in range(g.shape[0]):
            for t in range(r.c):
                e[i, t] = g[i, t] * slopes[i, t]


@called
def ask(r, l):  # noqa: E741
    """F of a layer, from its keys and queries."""
    x, h, scores, keep = of(r, X, l), of(r, H, l), r.squares[SCORES], r.squares[KEEP]
    width, tall = x.shape[0], r.kinds * x.shape[0]
    f = cut(r.factors, ASKED * r.most, tall + r.c, r.c)
    product(scores, x.T, h)
    for j in range(width):
        for t in range(r.c):
            f[j, t] = r.gates[OF_W, t] * h[j, t]
        if r.kinds > 1:
            for t in range(r.c):
                f[width + j, t] = r.gates[OF_P, t] * h[j, t]
    for i in range(r.c):
        for t in range(r.c):
            f[tall + i, t] = -keep[t, i] * scores[i, t]
    return f


@called
def push(r, l, n):  # noqa: E741
    """The keys of a layer as they weigh in W' and P', with the sign of a step [G w, c]."""
    x, keep, speed = of(r, X, l), r.squares[KEEP], r.squares[SPEED]
    width = x.shape[0]
    y = cut(r.factors, PUSHED * r.most, r.kinds * width, r.c)
    for j in range(width):
        for i in range(r.c):
            y[j, i] = -keep[n - 1, i] * x[j, i]
        if r.kinds > 1:
            for i in range(r.c):
                y[width + j, i] = -speed[n - 1, i] * x[j, i]
    return y


@inner
def moved(r, after, now, l, n):  # noqa: E741
    """W' = a W + b P - sum c_i x_i e_i and P' = d P - sum d_i x_i e_i of a layer."""
    width, kinds, y, zero = r.sizes[WIDTH, l], r.kinds, push(r, l, n), r.gates.dtype.type(0)
    a, b, d = r.gates[OF_W, n - 1], r.gates[OF_P, n - 1], r.gates[SLOWED, n - 1]
    e, speed = lower(now, kinds * width), upper(lower(now, width * (kinds - 1)), width)
    if kinds > 1:
        move(upper(lower(after, width), width), d, speed, zero, speed, lower(y, width), e)
    move(upper(after, width), a, upper(now, width), b, speed, upper(y, width), e)


@called
def piece_at(position, left, chunk, size):
    """Tokens of the piece that begins so far in a chunk: it ends at a multiple of `size`, or with chunk or sequence."""
    return min(size - position % size, chunk - position, left)


@called
def kept_places(sizes, c, kinds):
    """Where what is kept of a piece has products of its keys, and of its queries; nobody uses their place 0."""
    behind, head = extent(sizes, c, kinds), c * sizes[WIDE, 1]
    return behind - head, behind + c * (sizes[WIDE, -1] - sizes[WIDE, 1]) - head


@compiled
def forward(
    first, last, rows, chunk, size, c, sizes, loss, threshold, has_norm, activation, tokens, norm, given, out, finals,
    kept,
):  # fmt: skip
    """Given and finals [G + 1, S, H, numbers] are W, S and, with momentum, P; rows [S, 4]: `schedule.Row`, first piece.

    Kept where there is room, [M, H, numbers]: B, and products of keys and of queries, these without the last.
    """
    heads, layers, lanes = out.shape[1], sizes.shape[1] - 2, given.shape[1] * out.shape[1]
    r, keeps, stride = made(sizes, c, given.shape[0] - 1, out, ROOM), kept.shape[0] > 0, kept.shape[2]
    zs, os = kept_places(sizes, c, r.kinds)
    z, o, z_at, o_at = r.layered, r.layered, Z * r.wide, O * r.wide
    for lane in range(first, last):
        s, h = lane // heads, lane % heads
        begin, length, position = rows[s, 0], rows[s, 1], rows[s, 2]
        now, now_at, t, many = r.states, 0, 0, given.shape[3]
        if keeps and length > 0:
            now, now_at = kept.reshape(-1), (rows[s, 3] * heads + h) * stride
        taken(r, now, now_at, given, lane * many, 0)
        taken(r, r.states, START * r.total, given, (lanes + lane) * many, 0)
        if r.kinds > 1:
            taken(r, now, now_at, given, (2 * lanes + lane) * many, 1)
        while t < length:
            n, start, start_at = piece_at(position, length - t, chunk, size), r.states, START * r.total
            if position == 0:
                start, start_at = now, now_at
                if n < chunk:
                    for i in range(r.total):
                        r.states[START * r.total + i] = now[now_at + i]
            after, after_at = r.states, r.total if now_at == 0 else 0
            if keeps:
                z, z_at, o, o_at = now, now_at + zs, now, now_at + os
                if t + n < length:
                    after, after_at = now, now_at + heads * stride
            read(r, begin + t, n, h, tokens)
            for l in range(layers):  # noqa: E741
                found, x = place(r, z, z_at, l + 1), of(r, X, l)
                product(found, upper(layer(r, start, start_at, l), x.shape[0]).T, x)
                if l + 1 < layers:
                    bent(of(r, X, l + 1), of(r, SLOPE, l + 1), of(r, BEND, l + 1), found, activation)
            surprised(r, z, z_at, start, start_at, norm[:, h], loss, threshold, has_norm)
            for l in range(layers):  # noqa: E741
                both, answer = layer(r, now, now_at, l), r.ends[Y]
                turned(lower(both, r.kinds * sizes[WIDTH, l]), of(r, E, l + 1))
                if l + 1 < layers:
                    answer = place(r, o, o_at, l + 1)
                product(answer, both.T, ask(r, l))
                if l + 1 < layers:
                    activated(of(r, H, l + 1), answer, activation)
                moved(r, layer(r, after, after_at, l), both, l, n)
            stored(out, begin + t, n, h, r.ends[Y])
            now, now_at, t, position = after, after_at, t + n, (position + n) % chunk
        given_back(r, finals, lane * many, now, now_at, 0)
        if length > 0 and position == 0:
            given_back(r, finals, (lanes + lane) * many, now, now_at, 0)
        else:
            given_back(r, finals, (lanes + lane) * many, r.states, START * r.total, 0)
        if r.kinds > 1:
            given_back(r, finals, (2 * lanes + lane) * many, now, now_at, 1)
