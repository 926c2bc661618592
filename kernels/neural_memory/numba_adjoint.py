"""The loops of `numba.py`, second pass: the adjoint of every piece, from the last to the first.

Let R = [dW'; dP'] be the adjoint of what is behind a piece and Z that of the weights at the chunk's start. With the
names of `numba_loops.py`, from do on down, a layer has

    U = B dO = [a part for W; for P; e_i . do_t],   V = R e = [for W'; for P'],
    dh = a U_W + b U_P + x N^T,   dx = h N - c_i V_W - d_i V_P,   N_ti = -c_ti U_E[i, t],
    de = do F_E^T - R^T y,   R before = [a R_W; b R_W + d R_P] + F do^T,

and every coefficient the product of what it weighs with its adjoint. Then the slopes walk back up through the layers,
where the start's weights take their share, and products of the keys down again. Where a chunk begins, the adjoint of
its start joins that of W.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"
# numba compiles a function for the types that come, and gives an intrinsic its first argument

from kernels.common.numba import called, compiled, inner
from kernels.common.numba_product import add, move, product
from kernels.neural_memory.numba_loops import (
    BEND,
    DECAY,
    INVERSE,
    KEEP,
    OF_P,
    OF_W,
    ROOM,
    SCORES,
    SLOPE,
    SLOWED,
    SLOWING,
    SPEED,
    STEP,
    E,
    G,
    H,
    O,
    V,
    X,
    Y,
    Z,
    ask,
    kept_places,
    push,
    read,
    surprised,
)
from kernels.neural_memory.numba_parts import bent, slope_back
from kernels.neural_memory.numba_room import (
    WIDTH,
    cut,
    given_back,
    layer,
    lower,
    made,
    of,
    place,
    stored,
    taken,
    turned,
    upper,
    vectors,
)

# A room of adjoints has the same rows as that of what they belong to, but for: the derivative of the activation behind
# the queries in the place of `SLOPE`, N^T in the place of `SCORES`, products with B and R and what is turned in
# `factors`, R and Z in `states`.
CURVE, SQUARE = SLOPE, SCORES
OF_B, OF_R, TURNED = range(3)
STATE, START = range(2)
BACK = (*ROOM[:4], 3, 2)


@inner
def _again(r, b, kept, z_at, o_at, activation):
    """What follows from the products that the first pass kept."""
    for l in range(1, r.sizes.shape[1] - 2):  # noqa: E741
        slopes, bends = of(r, SLOPE, l), of(r, BEND, l)
        bent(of(r, X, l), slopes, bends, place(r, kept, z_at, l), activation)
        # nobody asks for the second derivative behind queries: that room is free
        curve, spare = of(b, CURVE, l), of(b, BEND, l)
        bent(of(r, H, l), curve, spare, place(r, kept, o_at, l), activation)


@called
def _coefficients_of(r, b, u, v, l, n):  # noqa: E741
    """What a layer gives the adjoints of coefficients by its keys and queries, and N^T."""
    x, h, width = of(r, X, l), of(r, H, l), r.sizes[WIDTH, l]
    keep, speed, gates, scores = b.squares[KEEP], b.squares[SPEED], b.gates, r.squares[SCORES]
    # four rows at a time: what they are added to is read and written less often
    for j in range(0, width, 4):
        for t in range(r.c):
            found = h[j, t] * u[j, t] + h[j + 1, t] * u[j + 1, t]
            gates[OF_W, t] += found + (h[j + 2, t] * u[j + 2, t] + h[j + 3, t] * u[j + 3, t])
            found = x[j, t] * v[j, t] + x[j + 1, t] * v[j + 1, t]
            keep[n - 1, t] -= found + (x[j + 2, t] * v[j + 2, t] + x[j + 3, t] * v[j + 3, t])
    if r.kinds > 1:
        for j in range(0, width, 4):
            i = width + j
            for t in range(r.c):
                found = h[j, t] * u[i, t] + h[j + 1, t] * u[i + 1, t]
                gates[OF_P, t] += found + (h[j + 2, t] * u[i + 2, t] + h[j + 3, t] * u[i + 3, t])
                found = x[j, t] * v[i, t] + x[j + 1, t] * v[i + 1, t]
                speed[n - 1, t] -= found + (x[j + 2, t] * v[i + 2, t] + x[j + 3, t] * v[i + 3, t])
    for i in range(r.c):
        for t in range(r.c):
            found = u[r.kinds * width + i, t]
            keep[t, i] -= scores[i, t] * found
            b.squares[SQUARE, i, t] = -r.squares[KEEP, t, i] * found


@called
def _weights_of(gates, both, matrix, n, kinds):
    """What a layer gives them by W and P: their products with R."""
    zero, width = both[0, 0] - both[0, 0], matrix.shape[0] // kinds
    of_w, of_p, of_d = zero, zero, zero
    for i in range(width):
        for j in range(both.shape[1]):
            of_w += matrix[i, j] * both[i, j]
        if kinds > 1:
            for j in range(both.shape[1]):
                of_p += matrix[i, j] * both[width + i, j]
                of_d += matrix[width + i, j] * both[width + i, j]
    gates[OF_W, n - 1] += of_w
    gates[OF_P, n - 1] += of_p
    gates[SLOWED, n - 1] += of_d


@inner
def _before(r, matrix, f, do, n):
    """R before the piece: [a R_W; b R_W + d R_P] + F do^T."""
    width, zero, gates = matrix.shape[0] // r.kinds, r.gates.dtype.type(0), r.gates
    of_w = upper(matrix, width)
    if r.kinds > 1:
        of_p = lower(matrix, width)
        move(of_p, gates[SLOWED, n - 1], of_p, gates[OF_P, n - 1], of_w, upper(lower(f, width), width), do)
    move(of_w, gates[OF_W, n - 1], of_w, zero, of_w, upper(f, width), do)


@inner
def _layer_back(r, b, both, l, n):  # noqa: E741
    """From do of a layer to dh, dx, de and R before the piece."""
    width, tall, next_ = r.sizes[WIDTH, l], r.kinds * r.sizes[WIDTH, l], r.sizes[WIDTH, l + 1]
    x, h, do = of(r, X, l), of(r, H, l), of(b, O, l + 1)
    dx, dh, de = of(b, X, l), of(b, H, l), of(b, E, l + 1)
    f, y, matrix = ask(r, l), push(r, l, n), upper(layer(b, b.states, 0, l), tall)
    u, v = cut(b.factors, OF_B * b.most, tall + r.c, r.c), cut(b.factors, OF_R * b.most, tall, r.c)
    product(u, both, do)
    product(v, matrix, of(r, E, l + 1))
    _coefficients_of(r, b, u, v, l, n)
    _weights_of(b.gates, both, matrix, n, r.kinds)
    for j in range(width):
        for t in range(r.c):
            dx[j, t] = -r.squares[KEEP, n - 1, t] * v[j, t]
            dh[j, t] = r.gates[OF_W, t] * u[j, t]
        if r.kinds > 1:
            for t in range(r.c):
                dx[j, t] -= r.squares[SPEED, n - 1, t] * v[width + j, t]
                dh[j, t] += r.gates[OF_P, t] * u[width + j, t]
    # the scores have been read: their room is free
    square, side = r.squares[SCORES], cut(b.factors, TURNED * b.most, r.c, next_)
    add(dh, x, b.squares[SQUARE])
    turned(square, b.squares[SQUARE])
    add(dx, h, square)
    turned(square, lower(f, tall))
    product(de, do, square)
    add(de, matrix.T, y)
    turned(side, do)
    _before(r, matrix, f, side, n)
    if l > 0:
        before, curve = of(b, O, l), of(b, CURVE, l)
        for j in range(width):
            for t in range(r.c):
                before[j, t] = dh[j, t] * curve[j, t]


@inner
def _slopes_back(r, b, kept, both_at, start, start_at, dstart):
    """From de of all layers to that of the last one; what the start's weights and the products of keys get of it."""
    for l in range(1, r.sizes.shape[1] - 2):  # noqa: E741
        dz, dg, de = of(b, Z, l), of(b, G, l), of(b, E, l)
        g, slopes, bends = of(r, G, l), of(r, SLOPE, l), of(r, BEND, l)
        width = g.shape[0]
        for i in range(width):
            for t in range(r.c):
                dz[i, t] = de[i, t] * g[i, t] * bends[i, t]
                dg[i, t] = de[i, t] * slopes[i, t]
        add(of(b, E, l + 1), upper(layer(r, start, start_at, l), width).T, dg)
        add(upper(layer(b, b.states, dstart, l), width), dg, lower(layer(r, kept, both_at, l), r.kinds * width))


@inner
def _products_back(r, b, start, start_at, dstart):
    """From dz of the last layer to dx of the first, and what the start's weights get."""
    for l in range(r.sizes.shape[1] - 3, -1, -1):  # noqa: E741
        x, dz, dx = of(r, X, l), of(b, Z, l + 1), of(b, X, l)
        width, side = x.shape[0], cut(b.factors, TURNED * b.most, r.c, dz.shape[0])
        add(dx, upper(layer(r, start, start_at, l), width), dz)
        turned(side, dz)
        add(upper(layer(b, b.states, dstart, l), width), x, side)
        if l > 0:
            before, slopes = of(b, Z, l), of(r, SLOPE, l)
            for i in range(width):
                for t in range(r.c):
                    before[i, t] += dx[i, t] * slopes[i, t]


@called
def _weigh_back(r, b, t0, n, h, ddecays, dslowings):
    """The adjoint of `weigh`: of the logarithms of decays."""
    keep, speed, gates = r.squares[KEEP], r.squares[SPEED], r.gates
    dkeep, dspeed, dgates = b.squares[KEEP], b.squares[SPEED], b.gates
    for t in range(n - 1, -1, -1):
        a, d, was = gates[DECAY, t], gates[SLOWING, t], t - 1
        if r.kinds > 1:
            # W_t holds P_t as it is
            dgates[SLOWED, t] += dgates[OF_P, t]
            for i in range(t + 1):
                dspeed[t, i] += dkeep[t, i]
        of_a, of_d = dgates[OF_W, t], dgates[SLOWED, t]
        if t > 0:
            of_a = of_a * gates[OF_W, was] + dgates[OF_P, t] * gates[OF_P, was]
            of_d *= gates[SLOWED, was]
            dgates[OF_W, was] += a * dgates[OF_W, t]
            dgates[OF_P, was] += a * dgates[OF_P, t]
            dgates[SLOWED, was] += d * dgates[SLOWED, t]
        for i in range(t):
            of_a += dkeep[t, i] * keep[was, i]
            dkeep[was, i] += a * dkeep[t, i]
            if r.kinds > 1:
                of_d += dspeed[t, i] * speed[was, i]
                dspeed[was, i] += d * dspeed[t, i]
        ddecays[t0 + t, h], dslowings[t0 + t, h] = a * of_a, d * of_d


@called
def _joined(b):
    """A chunk begins: dW takes what its start has, of which nothing is left."""
    for l in range(b.sizes.shape[1] - 2):  # noqa: E741
        state, start = layer(b, b.states, STATE * b.total, l), layer(b, b.states, START * b.total, l)
        for i in range(b.sizes[WIDTH, l]):
            for j in range(state.shape[1]):
                state[i, j] += start[i, j]
                start[i, j] = 0


@compiled
def backward(
    first, last, rows, chunk, size, c, sizes, loss, threshold, has_norm, activation, tokens, norm, given, kept, do,
    dfinals, grads, dnorm, dgiven,
):  # fmt: skip
    """Gradients of tokens, norm [2, S, H, V] and given state, from those of outputs and final state."""
    dq, dk, dv, dsteps, ddecays, dslowings = grads
    heads, layers, kinds, lanes = do.shape[1], sizes.shape[1] - 2, given.shape[0] - 1, given.shape[1] * do.shape[1]
    r, b, pieces = made(sizes, c, kinds, do, ROOM), made(sizes, c, kinds, do, BACK), -(-chunk // size)
    zs, os = kept_places(sizes, c, kinds)
    stride, kept, many = kept.shape[2], kept.reshape(-1), given.shape[3]
    for lane in range(first, last):
        s, h = lane // heads, lane % heads
        begin, length, position = rows[s, 0], rows[s, 1], rows[s, 2]
        taken(b, b.states, STATE * b.total, dfinals, lane * many, 0)
        taken(b, b.states, START * b.total, dfinals, (lanes + lane) * many, 0)
        if kinds > 1:
            taken(b, b.states, STATE * b.total, dfinals, (2 * lanes + lane) * many, 1)
        taken(r, r.states, 0, given, (lanes + lane) * many, 0)
        dnorm[:, s, h] = 0
        # the end of what is left, counted from the first token of the chunk that the sequence begins in
        end = position + length
        if length > 0 and end % chunk == 0:
            _joined(b)
        while end > position:
            number = (end - 1) // chunk
            inside = (end - 1) % chunk // size * size
            n = min(end - number * chunk - inside, end - position)
            is_chunk = end % chunk == 0 and n == chunk
            end -= n
            t0, m = begin + end - position, rows[s, 3] + number * pieces + inside // size - position // size
            at, start, start_at = (m * heads + h) * stride, kept, ((m - inside // size) * heads + h) * stride
            if number == 0 and position > 0:
                start, start_at = r.states, 0
            read(r, t0, n, h, tokens)
            vectors(of(b, O, layers), do, t0, n, h)
            _again(r, b, kept, at + zs, at + os, activation)
            surprised(r, kept, at + zs, start, start_at, norm[:, h], loss, threshold, has_norm)
            b.gates[:], b.squares[:] = 0, 0
            for l in range(layers - 1, -1, -1):  # noqa: E741
                _layer_back(r, b, layer(r, kept, at, l), l, n)
            dstart = START * b.total
            if end % chunk == 0:
                # the start is W, as it is now
                dstart = STATE * b.total
                if not is_chunk:
                    _joined(b)
            _slopes_back(r, b, kept, at, start, start_at, dstart)
            slope_back(
                of(b, Z, layers), b.ends[V], of(b, X, 0), b.gates[STEP], dnorm[:, s, h], of(b, E, layers),
                of(r, E, layers), r.ends[Y], r.gates[INVERSE], place(r, kept, at + zs, layers), of(r, X, 0), r.ends[V],
                r.gates[STEP], norm[:, h], loss, threshold, has_norm, n,
            )  # fmt: skip
            _products_back(r, b, start, start_at, dstart)
            _weigh_back(r, b, t0, n, h, ddecays, dslowings)
            stored(dq, t0, n, h, of(b, H, 0))
            stored(dk, t0, n, h, of(b, X, 0))
            stored(dv, t0, n, h, b.ends[V])
            for i in range(n):
                dsteps[t0 + i, h] = b.gates[STEP, i]
        given_back(b, dgiven, lane * many, b.states, STATE * b.total, 0)
        given_back(b, dgiven, (lanes + lane) * many, b.states, START * b.total, 0)
        if kinds > 1:
            given_back(b, dgiven, (2 * lanes + lane) * many, b.states, STATE * b.total, 1)
