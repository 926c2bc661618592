"""The loops of `numba.py`: one lane per sequence and head, token after token, compiled anew for every pair of widths.

With a, b the decays of W and P, S the weights at the chunk's start, c the step, and n a LayerNorm or nothing:

    x = k S,  y = n(x),  e = c times the slope of |y - v|^2 / 2 at x,  P = b P' - k e^T,  W = a W' + P,  o = q W

(' is before the token; behind a norm it is k + gamma y + bias that is compared with v). Let A, B, Z be the adjoints of
W, P and S, with all that comes later. Walking back, a token has

    dq = W do,  A += q do^T,  B += A,  dk = -B e,  de = -k B,  dlog a = a <A, W'>,  dlog b = b <B, P'>

and leaves a A and b B to the one before it. de goes through the slope to dx, then dk += S dx and Z += k dx^T. Where the
chunk begins S is W', so that A takes what Z has, and Z begins anew. The forward keeps x of all tokens, and W, S, P
every `STRETCH` tokens; the backward walks each stretch again and holds its matrices, so that nothing is divided by a
decay.

Rows of a matrix lie along what vectors run over: [K, V] forward, where rows are weighted by k and q and added up,
[V, K] backward, where they are weighted by do, e and dx. Only de is a sum along rows. Widths are multiples of 4
and known to the compiler in the loops over matrices, where four rows go side by side, so that what they are added to is
read and written less often; loops over one vector would be unrolled to single numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

import math
from functools import lru_cache

import numpy as np

from kernels.common.numba import compiled, inner
from kernels.neural_memory.model import NORM_EPS

# tokens between kept states: the backward holds as many matrices
STRETCH = 32


@inner
def _copy(out, given):
    for i in range(given.shape[0]):
        for j in range(given.shape[1]):
            out[i, j] = given[i, j]


@inner
def _moved(W, P, n, m, i, j, a, b, change, has_momentum):
    """One number of W after a token, of which `change` is the step: from place n to place m."""
    if has_momentum:
        change += b * P[n, i, j]
        P[m, i, j] = change
    change += a * W[n, i, j]
    W[m, i, j] = change
    return change


@inner
def _moved_back(A, B, W, P, n, i, j, a, b, push, has_momentum):
    """One number of A and B before a token that gives A `push`: what the step gets, and what the decays get."""
    now = A[i, j] + push
    A[i, j] = a * now
    of_keep = now * W[n, i, j]
    if not has_momentum:
        return now, of_keep, of_keep
    speeding = B[i, j] + now
    B[i, j] = b * speeding
    return speeding, of_keep, speeding * P[n, i, j]


@inner
def _projected(out, given, m, ys, n, inverse, width):
    """out[m] = the gradient given[m] by a LayerNorm's output ys[n] taken to its input."""
    zero = inverse - inverse
    mean, along, share = zero, zero, out.dtype.type(1) / out.dtype.type(width)
    for j in range(width):
        mean += given[m, j]
        along += given[m, j] * ys[n, j]
    for j in range(width):
        out[m, j] = inverse * (given[m, j] - share * (mean + along * ys[n, j]))


@inner
def _slope(es, ys, n, x, k, v, t, h, step, norm, has_norm):
    """es[n] and, behind a norm, ys[n] and one over its deviation, which is returned."""
    width = norm.shape[2]
    if not has_norm:
        for j in range(width):
            es[n, j] = step * (x[t, h, j] - v[t, h, j])
        return step
    one = x.dtype.type(1)
    share = one / x.dtype.type(width)
    mean, square = one - one, one - one
    for j in range(width):
        mean += x[t, h, j]
    for j in range(width):
        ys[n, j] = x[t, h, j] - share * mean
        square += ys[n, j] * ys[n, j]
    inverse = one / math.sqrt(share * square + x.dtype.type(NORM_EPS))
    for j in range(width):
        y, gamma = inverse * ys[n, j], norm[0, h, j]
        ys[n, j] = y
        es[n, j] = step * gamma * (k[t, h, j] + gamma * y + norm[1, h, j] - v[t, h, j])
    _projected(es, es, n, ys, n, inverse, width)
    return inverse


@inner
def _slope_back(dx, de, dk, dv, dnorm, s, es, ys, n, x, k, v, t, h, step, inverse, norm, has_norm):
    """From de [1, V] to dx and dv, onto dk and dnorm; returns the gradient of the step. Behind a norm, see normed.py.

    There dx and dv hold what is in between.
    """
    width, of_step = norm.shape[2], step - step
    if not has_norm:
        for j in range(width):
            dx[0, j] = step * de[0, j]
            dv[t, h, j] = -step * de[0, j]
            of_step += de[0, j] * (x[t, h, j] - v[t, h, j])
        return of_step
    share = x.dtype.type(1) / x.dtype.type(width)
    _projected(dx, de, 0, ys, n, inverse, width)
    error_y, de_y, de_e = of_step, of_step, of_step
    for j in range(width):
        y, gamma, of_delta = ys[n, j], norm[0, h, j], dx[0, j]
        error = k[t, h, j] + gamma * y + norm[1, h, j] - v[t, h, j]
        error_y += step * gamma * error * y
        de_y += de[0, j] * y
        de_e += de[0, j] * es[n, j]
        of_step += of_delta * gamma * error
        dnorm[0, s, h, j] += step * of_delta * (error + gamma * y)
        dnorm[1, s, h, j] += step * of_delta * gamma
    error_y, de_y, de_e = inverse * share * error_y, inverse * share * de_y, inverse * share * de_e
    for j in range(width):
        gamma = norm[0, h, j]
        error = k[t, h, j] + gamma * ys[n, j] + norm[1, h, j] - v[t, h, j]
        of_error = step * gamma * dx[0, j]
        dx[0, j] = gamma * of_error - de[0, j] * error_y - step * gamma * error * de_y
        dv[t, h, j] = -of_error
        dk[t, h, j] += of_error
    _projected(dx, dx, 0, ys, n, inverse, width)
    for j in range(width):
        dx[0, j] -= ys[n, j] * de_e
    return of_step


@lru_cache
def forward(keys, values, has_momentum, has_norm):
    """The loop of the first pass; behind a norm, only as many values as it has are not padding."""

    @compiled
    def loop(first, last, rows, chunk, tokens, norm, given, out, x, finals, kept):
        q, k, v, steps, decays, slowings = tokens
        heads, number = q.shape[1], q.dtype
        zero, S = number.type(0), np.empty((keys, values), number)
        W, P = np.empty((1, keys, values), number), np.empty((1, keys, values), number)
        es, ys = np.zeros((1, values), number), np.zeros((1, values), number)
        for lane in range(first, last):
            s, h = lane // heads, lane % heads
            _copy(W[0], given[0, s, h])
            _copy(S, given[1, s, h])
            if has_momentum:
                _copy(P[0], given[2, s, h])
            begin, length, position, place = rows[s, 0], rows[s, 1], rows[s, 2], rows[s, 3]
            for n in range(length):
                t = begin + n
                if position == 0:
                    _copy(S, W[0])
                if kept.shape[0] > 0 and n % STRETCH == 0:
                    states = kept[place + n // STRETCH, h]
                    _copy(states[0], W[0])
                    _copy(states[1], S)
                    if has_momentum:
                        _copy(states[2], P[0])
                a, b = decays[t, h], slowings[t, h]
                for j in range(v.shape[2]):
                    x[t, h, j] = zero
                    out[t, h, j] = zero
                for i in range(0, keys, 4):
                    k0, k1, k2, k3 = k[t, h, i], k[t, h, i + 1], k[t, h, i + 2], k[t, h, i + 3]
                    for j in range(values):
                        sum_ = k0 * S[i, j] + k1 * S[i + 1, j]
                        x[t, h, j] += sum_ + (k2 * S[i + 2, j] + k3 * S[i + 3, j])
                _slope(es, ys, 0, x, k, v, t, h, steps[t, h], norm, has_norm)
                for i in range(0, keys, 4):
                    k0, k1, k2, k3 = k[t, h, i], k[t, h, i + 1], k[t, h, i + 2], k[t, h, i + 3]
                    q0, q1, q2, q3 = q[t, h, i], q[t, h, i + 1], q[t, h, i + 2], q[t, h, i + 3]
                    for j in range(values):
                        e = -es[0, j]
                        sum_ = q0 * _moved(W, P, 0, 0, i, j, a, b, k0 * e, has_momentum)
                        sum_ += q1 * _moved(W, P, 0, 0, i + 1, j, a, b, k1 * e, has_momentum)
                        sum_ += q2 * _moved(W, P, 0, 0, i + 2, j, a, b, k2 * e, has_momentum)
                        sum_ += q3 * _moved(W, P, 0, 0, i + 3, j, a, b, k3 * e, has_momentum)
                        out[t, h, j] += sum_
                position = position + 1 if position + 1 < chunk else 0
            if length > 0 and position == 0:
                _copy(S, W[0])
            _copy(finals[0, s, h], W[0])
            _copy(finals[1, s, h], S)
            if has_momentum:
                _copy(finals[2, s, h], P[0])

    return loop


@inner
def _begin(A, Z):
    """A takes what Z has, and nothing is left."""
    for j in range(A.shape[0]):
        for i in range(A.shape[1]):
            A[j, i] += Z[j, i]
            Z[j, i] = 0


@inner
def _again(dq, do, W, P, n, es, k, t, h, a, b, keys, values, has_momentum):
    """W and P after a token to the places behind those before it, and dq."""
    for i in range(k.shape[2]):
        dq[t, h, i] = 0
    for j in range(0, values, 4):
        e0, e1, e2, e3 = es[n, j], es[n, j + 1], es[n, j + 2], es[n, j + 3]
        d0, d1, d2, d3 = do[t, h, j], do[t, h, j + 1], do[t, h, j + 2], do[t, h, j + 3]
        for i in range(keys):
            key = -k[t, h, i]
            sum_ = d0 * _moved(W, P, n, n + 1, j, i, a, b, e0 * key, has_momentum)
            sum_ += d1 * _moved(W, P, n, n + 1, j + 1, i, a, b, e1 * key, has_momentum)
            sum_ += d2 * _moved(W, P, n, n + 1, j + 2, i, a, b, e2 * key, has_momentum)
            sum_ += d3 * _moved(W, P, n, n + 1, j + 3, i, a, b, e3 * key, has_momentum)
            dq[t, h, i] += sum_


@inner
def _through_step(dk, de, da, db, A, B, W, P, n, es, do, q, k, t, h, a, b, keys, values, has_decay, has_momentum):
    """A and B after a token to those before it; de, dk = -B e, and the summands [K] of <A, W'> and <B, P'>."""
    zero = a - a
    for i in range(k.shape[2]):
        dk[t, h, i] = da[i] = db[i] = zero
    for j in range(0, values, 4):
        e0, e1, e2, e3 = es[n, j], es[n, j + 1], es[n, j + 2], es[n, j + 3]
        d0, d1, d2, d3 = do[t, h, j], do[t, h, j + 1], do[t, h, j + 2], do[t, h, j + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        for i in range(keys):
            key, query = -k[t, h, i], q[t, h, i]
            x0, y0, z0 = _moved_back(A, B, W, P, n, j, i, a, b, d0 * query, has_momentum)
            x1, y1, z1 = _moved_back(A, B, W, P, n, j + 1, i, a, b, d1 * query, has_momentum)
            x2, y2, z2 = _moved_back(A, B, W, P, n, j + 2, i, a, b, d2 * query, has_momentum)
            x3, y3, z3 = _moved_back(A, B, W, P, n, j + 3, i, a, b, d3 * query, has_momentum)
            s0 += x0 * key
            s1 += x1 * key
            s2 += x2 * key
            s3 += x3 * key
            dk[t, h, i] -= x0 * e0 + x1 * e1 + (x2 * e2 + x3 * e3)
            if has_decay:
                da[i] += y0 + y1 + (y2 + y3)
            if has_momentum:
                db[i] += z0 + z1 + (z2 + z3)
        de[0, j], de[0, j + 1], de[0, j + 2], de[0, j + 3] = s0, s1, s2, s3


@inner
def _through_start(dk, Z, dx, W, at, k, t, h, keys, values):
    """dk += S dx and Z += k dx^T, where S is in place `at`."""
    for j in range(0, values, 4):
        d0, d1, d2, d3 = dx[0, j], dx[0, j + 1], dx[0, j + 2], dx[0, j + 3]
        for i in range(keys):
            key = k[t, h, i]
            sum_ = d0 * W[at, j, i] + d1 * W[at, j + 1, i]
            dk[t, h, i] += sum_ + (d2 * W[at, j + 2, i] + d3 * W[at, j + 3, i])
            Z[j, i] += d0 * key
            Z[j + 1, i] += d1 * key
            Z[j + 2, i] += d2 * key
            Z[j + 3, i] += d3 * key


@lru_cache
def backward(keys, values, has_decay, has_momentum, has_norm):
    """The loop of the second pass."""

    @compiled
    def loop(first, last, rows, chunk, tokens, norm, x, kept, do, dfinals, grads, dnorm, dgiven):
        q, k, v, steps, decays, slowings = tokens
        dq, dk, dv, dsteps, ddecays, dslowings = grads
        heads, number, matrix, vector = q.shape[1], q.dtype, (values, keys), (STRETCH, values)
        zero, START = number.type(0), STRETCH + 1
        A, B, Z = np.empty(matrix, number), np.empty(matrix, number), np.empty(matrix, number)
        # of a stretch: W and P before every token and after the last, then S; spare rows keep places that are used
        # together from lying a multiple of 4096 bytes apart, which caches take for the same
        W, P = np.empty((STRETCH + 2, values + 1, keys), number), np.empty((STRETCH + 1, values + 3, keys), number)
        es, ys, inverses = np.zeros(vector, number), np.zeros(vector, number), np.empty(STRETCH, number)
        de, dx = np.zeros((1, values), number), np.zeros((1, values), number)
        da, db = np.empty(keys, number), np.empty(keys, number)
        for lane in range(first, last):
            s, h = lane // heads, lane % heads
            _copy(A, dfinals[0, s, h].T)
            _copy(Z, dfinals[1, s, h].T)
            if has_momentum:
                _copy(B, dfinals[2, s, h].T)
            begin, length, position, place = rows[s, 0], rows[s, 1], rows[s, 2], rows[s, 3]
            for j in range(norm.shape[2]):
                dnorm[0, s, h, j] = dnorm[1, s, h, j] = zero
            if length > 0 and (position + length) % chunk == 0:
                _begin(A, Z)
            for m in range((length - 1) // STRETCH, -1, -1):
                t0, states = begin + m * STRETCH, kept[place + m, h]
                count = min(STRETCH, begin + length - t0)
                _copy(W[0], states[0].T)
                _copy(W[START], states[1].T)
                if has_momentum:
                    _copy(P[0], states[2].T)
                for n in range(count):
                    t = t0 + n
                    inverses[n] = _slope(es, ys, n, x, k, v, t, h, steps[t, h], norm, has_norm)
                    _again(dq, do, W, P, n, es, k, t, h, decays[t, h], slowings[t, h], keys, values, has_momentum)
                for n in range(count - 1, -1, -1):
                    t = t0 + n
                    a, b, step = decays[t, h], slowings[t, h], steps[t, h]
                    _through_step(
                        dk, de, da, db, A, B, W, P, n, es, do, q, k, t, h, a, b, keys, values, has_decay, has_momentum
                    )  # fmt: skip
                    sum_a, sum_b = zero, zero
                    for i in range(k.shape[2]):
                        sum_a += da[i]
                        sum_b += db[i]
                    ddecays[t, h], dslowings[t, h] = a * sum_a, b * sum_b
                    dsteps[t, h] = _slope_back(
                        dx, de, dk, dv, dnorm, s, es, ys, n, x, k, v, t, h, step, inverses[n], norm, has_norm
                    )
                    # S is W' of the chunk's first token, if that is in this stretch
                    back = (position + t - begin) % chunk
                    _through_start(dk, Z, dx, W, n - back if back <= n else START, k, t, h, keys, values)
                    if back == 0:
                        _begin(A, Z)
            _copy(dgiven[0, s, h].T, A)
            _copy(dgiven[1, s, h].T, Z)
            if has_momentum:
                _copy(dgiven[2, s, h].T, B)

    return loop
