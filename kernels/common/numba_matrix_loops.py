"""The loops of `numba_matrix`, token by token, for one size each: sizes are constants of what is compiled.

A matrix that is moved, written and read at every token stays in the first cache, and loops of a known length over its
contiguous axis become straight vector code, nearly twice as fast as loops of any length. Four rows are taken at a time,
so that what they are added up to is read and written less often; what is missing to four is zeros.

Legend: R tokens, S sequences, N kept states, H heads, K key width, V value width, G gates a token (0, 1 or K). A matrix
is [K, V] in the forward, whose sums run over keys, and [V, K] in the backward, most of whose sums run over values.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

from functools import lru_cache
from typing import Any

import numpy as np

from kernels.common.numba import compiled, inner

EPS = 1e-6
# rows of what a token brings, [K], and of what it writes and reads, [V]
QUERY, KEY, KEEP, DQUERY, DKEY, DKEEP = range(6)
VALUE, READ = range(2)


@inner
def _load(w, q, k, decay, t, head, scale, is_normed):
    """Rows of w: query (scaled), key and decay of one token; returns by what their lengths were divided."""
    of_query = of_key = w.dtype.type(1)
    if is_normed:
        of_query, of_key = _shrink(q, t, head), _shrink(k, t, head)
    for i in range(q.shape[2]):
        w[QUERY, i] = of_query * scale * q[t, head, i]
    for i in range(q.shape[2]):
        w[KEY, i] = of_key * k[t, head, i]
    if decay.shape[2] == 1:
        for i in range(q.shape[2]):
            w[KEEP, i] = decay[t, head, 0]
    else:
        for i in range(decay.shape[2]):
            w[KEEP, i] = decay[t, head, i]
    return of_query, of_key


@inner
def _shrink(x, t, head):
    square = x.dtype.type(EPS)
    for i in range(x.shape[2]):
        square += x[t, head, i] * x[t, head, i]
    return x.dtype.type(1) / np.sqrt(square)


@inner
def _fade(state, w, of_v, rows, width):
    """state = decay * state; value = key @ state."""
    for j in range(width):
        of_v[VALUE, j] = 0
    for i in range(0, rows, 4):
        a0, a1, a2, a3 = w[KEEP, i], w[KEEP, i + 1], w[KEEP, i + 2], w[KEEP, i + 3]
        k0, k1, k2, k3 = w[KEY, i], w[KEY, i + 1], w[KEY, i + 2], w[KEY, i + 3]
        for j in range(width):
            x0, x1, x2, x3 = a0 * state[i, j], a1 * state[i + 1, j], a2 * state[i + 2, j], a3 * state[i + 3, j]
            state[i, j], state[i + 1, j], state[i + 2, j], state[i + 3, j] = x0, x1, x2, x3
            of_v[VALUE, j] += k0 * x0 + k1 * x1 + (k2 * x2 + k3 * x3)


@inner
def _write(state, w, of_v, rows, width, is_faded):
    """state = decay * state (unless that is done) + key value^T; read = query @ state; value and read are rows."""
    for j in range(width):
        of_v[READ, j] = 0
    a0 = a1 = a2 = a3 = state.dtype.type(1)
    for i in range(0, rows, 4):
        if not is_faded:
            a0, a1, a2, a3 = w[KEEP, i], w[KEEP, i + 1], w[KEEP, i + 2], w[KEEP, i + 3]
        k0, k1, k2, k3 = w[KEY, i], w[KEY, i + 1], w[KEY, i + 2], w[KEY, i + 3]
        q0, q1, q2, q3 = w[QUERY, i], w[QUERY, i + 1], w[QUERY, i + 2], w[QUERY, i + 3]
        for j in range(width):
            y = of_v[VALUE, j]
            x0, x1 = a0 * state[i, j] + k0 * y, a1 * state[i + 1, j] + k1 * y
            x2, x3 = a2 * state[i + 2, j] + k2 * y, a3 * state[i + 3, j] + k3 * y
            state[i, j], state[i + 1, j], state[i + 2, j], state[i + 3, j] = x0, x1, x2, x3
            of_v[READ, j] += q0 * x0 + q1 * x1 + (q2 * x2 + q3 * x3)


@lru_cache
def forward_of(num_k: int, num_v: int, is_delta: bool) -> Any:
    """The compiled forward for these sizes."""
    rows = -(-num_k // 4) * 4

    @compiled
    def forward(
        first, last, firsts, lengths, kept_at, chunk, scale, is_normed, q, k, v, beta, decay,
        starts, out, finals, kept,
    ):  # fmt: skip
        """All tokens of lanes first .. last: writes outputs, last states, and the state before every chunk."""
        heads, wide, tall = q.shape[1], q.shape[2], v.shape[2]
        state, w, of_v = np.zeros((rows, num_v), q.dtype), np.zeros((3, rows), q.dtype), np.empty((2, num_v), q.dtype)
        w[KEEP] = 1
        for lane in range(first, last):
            s, head = lane // heads, lane % heads
            state[:] = 0
            for i in range(wide):
                for j in range(tall):
                    state[i, j] = starts[s, head, i, j]
            for n in range(lengths[s]):
                t = firsts[s] + n
                if n % chunk == 0 and kept.shape[0] > 0:
                    row = kept_at[s] + n // chunk
                    for i in range(wide):
                        for j in range(tall):
                            kept[row, head, i, j] = state[i, j]
                _load(w, q, k, decay, t, head, scale, is_normed)
                if is_delta:
                    _fade(state, w, of_v, rows, num_v)
                    step = beta[t, head]
                    for j in range(tall):
                        of_v[VALUE, j] = step * (v[t, head, j] - of_v[VALUE, j])
                else:
                    for j in range(tall):
                        of_v[VALUE, j] = v[t, head, j]
                _write(state, w, of_v, rows, num_v, is_delta)
                for j in range(tall):
                    out[t, head, j] = of_v[READ, j]
            for i in range(wide):
                for j in range(tall):
                    finals[s, head, i, j] = state[i, j]

    return forward


@inner
def _fade_and_ask(states, n, after, w, values, rows, width):
    """states[n] = after * decay; values[n] = states[n] @ key."""
    for j in range(0, rows, 4):
        s0 = s1 = s2 = s3 = w[KEY, 0] - w[KEY, 0]
        for i in range(width):
            a, y = w[KEEP, i], w[KEY, i]
            x0, x1, x2, x3 = a * after[j, i], a * after[j + 1, i], a * after[j + 2, i], a * after[j + 3, i]
            states[n, j, i], states[n, j + 1, i], states[n, j + 2, i], states[n, j + 3, i] = x0, x1, x2, x3
            s0, s1, s2, s3 = s0 + x0 * y, s1 + x1 * y, s2 + x2 * y, s3 + x3 * y
        values[n, j], values[n, j + 1], values[n, j + 2], values[n, j + 3] = s0, s1, s2, s3


@inner
def _written(after, states, n, values, step, w, rows, width):
    """after = states[n] + step * values[n] key^T."""
    for j in range(0, rows, 4):
        e0, e1, e2, e3 = step * values[n, j], step * values[n, j + 1], step * values[n, j + 2], step * values[n, j + 3]
        for i in range(width):
            y = w[KEY, i]
            after[j, i], after[j + 1, i] = states[n, j, i] + e0 * y, states[n, j + 1, i] + e1 * y
            after[j + 2, i], after[j + 3, i] = states[n, j + 2, i] + e2 * y, states[n, j + 3, i] + e3 * y


@inner
def _adjoint(states, n, u, w, of_v, values, step, rows, width, is_delta):
    """One token back: u, the adjoint of the state after its write, becomes that of the state before its decay.

    Rows of w are query, key and decay, and their gradients; of `of_v` the gradient of the output, and of the value.
    """
    along = step - step
    for j in range(0, rows, 4):
        o0, o1, o2, o3 = of_v[READ, j], of_v[READ, j + 1], of_v[READ, j + 2], of_v[READ, j + 3]
        s0 = s1 = s2 = s3 = step - step
        for i in range(width):
            x, y = w[QUERY, i], w[KEY, i]
            d0, d1, d2, d3 = u[j, i] + o0 * x, u[j + 1, i] + o1 * x, u[j + 2, i] + o2 * x, u[j + 3, i] + o3 * x
            u[j, i], u[j + 1, i], u[j + 2, i], u[j + 3, i] = d0, d1, d2, d3
            s0, s1, s2, s3 = s0 + d0 * y, s1 + d1 * y, s2 + d2 * y, s3 + d3 * y
        of_v[VALUE, j], of_v[VALUE, j + 1], of_v[VALUE, j + 2], of_v[VALUE, j + 3] = s0, s1, s2, s3
        e0, e1, e2, e3 = step * values[n, j], step * values[n, j + 1], step * values[n, j + 2], step * values[n, j + 3]
        along += o0 * e0 + o1 * e1 + (o2 * e2 + o3 * e3)
        for i in range(width):
            w[DKEY, i] += e0 * u[j, i] + e1 * u[j + 1, i] + (e2 * u[j + 2, i] + e3 * u[j + 3, i])
        for i in range(width):
            x0, x1, x2, x3 = states[n, j, i], states[n, j + 1, i], states[n, j + 2, i], states[n, j + 3, i]
            w[DQUERY, i] += o0 * x0 + o1 * x1 + (o2 * x2 + o3 * x3)
        s0, s1, s2, s3 = step * s0, step * s1, step * s2, step * s3
        if is_delta:
            for i in range(width):
                x0, x1, x2, x3 = states[n, j, i], states[n, j + 1, i], states[n, j + 2, i], states[n, j + 3, i]
                w[DKEY, i] -= s0 * x0 + s1 * x1 + (s2 * x2 + s3 * x3)
        for i in range(width):
            y, a = w[KEY, i], w[KEEP, i]
            x0, x1, x2, x3 = states[n, j, i], states[n, j + 1, i], states[n, j + 2, i], states[n, j + 3, i]
            d0, d1, d2, d3 = u[j, i], u[j + 1, i], u[j + 2, i], u[j + 3, i]
            if is_delta:
                d0, d1, d2, d3 = d0 - s0 * y, d1 - s1 * y, d2 - s2 * y, d3 - s3 * y
            w[DKEEP, i] += d0 * x0 + d1 * x1 + (d2 * x2 + d3 * x3)
            u[j, i], u[j + 1, i], u[j + 2, i], u[j + 3, i] = a * d0, a * d1, a * d2, a * d3
    # the state that is read is the one after the write
    for i in range(width):
        w[DQUERY, i] += along * w[KEY, i]


@inner
def _unload(out, w, row, given, t, head, by, scale, is_normed):
    """The gradient of a query or key as it was given, before it was scaled and divided by its length."""
    along = by - by
    if is_normed:
        for i in range(given.shape[2]):
            along += w[row, i] * given[t, head, i]
    for i in range(given.shape[2]):
        out[t, head, i] = by * scale * (w[row, i] - given[t, head, i] * (by * by * along))


@lru_cache
def backward_of(num_k: int, num_v: int, is_delta: bool) -> Any:
    """The compiled backward for these sizes."""
    rows = -(-num_v // 4) * 4

    @compiled
    def backward(
        first, last, firsts, lengths, kept_at, chunk, scale, is_normed, q, k, v, beta, decay,
        kept, do, dfinals, dq, dk, dv, dbeta, dg, dstarts,
    ):  # fmt: skip
        """The same lanes from their ends, chunk by chunk: a chunk's states anew from the kept one, then the adjoint."""
        heads, wide, tall, one = q.shape[1], q.shape[2], v.shape[2], q.dtype.type(1)
        states, values = np.zeros((chunk, rows, num_k), q.dtype), np.zeros((chunk, rows), q.dtype)
        u, after = np.zeros((rows, num_k), q.dtype), np.zeros((rows, num_k), q.dtype)
        w, of_v = np.zeros((6, num_k), q.dtype), np.zeros((2, rows), q.dtype)
        w[KEEP] = 1
        for lane in range(first, last):
            s, head = lane // heads, lane % heads
            # rows that fill up to four hold no number of another lane
            u[:] = after[:] = 0
            for j in range(tall):
                for i in range(wide):
                    u[j, i] = dfinals[s, head, i, j]
            for c in range((lengths[s] + chunk - 1) // chunk - 1, -1, -1):
                row, t0, many = kept_at[s] + c, firsts[s] + c * chunk, min(chunk, lengths[s] - c * chunk)
                for j in range(tall):
                    for i in range(wide):
                        after[j, i] = kept[row, head, i, j]
                for n in range(many):
                    t = t0 + n
                    _load(w, q, k, decay, t, head, scale, is_normed)
                    _fade_and_ask(states, n, after, w, values, rows, num_k)
                    for j in range(tall):
                        values[n, j] = v[t, head, j] - values[n, j] if is_delta else v[t, head, j]
                    _written(after, states, n, values, beta[t, head] if is_delta else one, w, rows, num_k)
                for n in range(many - 1, -1, -1):
                    t = t0 + n
                    by_q, by_k = _load(w, q, k, decay, t, head, scale, is_normed)
                    for i in range(wide):
                        w[DQUERY, i] = w[DKEY, i] = w[DKEEP, i] = 0
                    for j in range(tall):
                        of_v[READ, j] = do[t, head, j]
                    step = beta[t, head] if is_delta else one
                    _adjoint(states, n, u, w, of_v, values, step, rows, num_k, is_delta)
                    _unload(dq, w, DQUERY, q, t, head, by_q, scale, is_normed)
                    _unload(dk, w, DKEY, k, t, head, by_k, one, is_normed)
                    into_step = into_keep = one - one
                    for j in range(tall):
                        dv[t, head, j] = step * of_v[VALUE, j]
                        into_step += of_v[VALUE, j] * values[n, j]
                    if is_delta:
                        dbeta[t, head] = into_step
                    if dg.shape[2] == 1:
                        for i in range(wide):
                            into_keep += w[DKEEP, i]
                        dg[t, head, 0] = into_keep
                    else:
                        for i in range(dg.shape[2]):
                            dg[t, head, i] = w[DKEEP, i]
            for j in range(tall):
                for i in range(wide):
                    dstarts[s, head, i, j] = u[j, i]

    return backward
