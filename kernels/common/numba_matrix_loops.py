"""The loops of `numba_matrix`, token by token, for one size each: sizes are constants of what is compiled.

A matrix that is moved, written and read at every token stays in the nearest cache, and is walked in whole vectors whose
sums stay in registers. It is [W, U] in the forward, where sums run over keys, and [U, W] in the backward, where all
sums but one run over values. Tokens are laid out chunk by chunk: what was just written number by number cannot be read
in whole vectors at once, and a function that is handed arrays counts references to them, by instructions that lock,
which at every token would cost more than its arithmetic.

Legend: W, U key width K and value width V, filled up to whole vectors with zeros; R tokens, C tokens of a chunk, S
sequences, H heads, N kept states, G gates a token (0, 1 or K).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
# numba compiles a function for the types that come, and gives an intrinsic its first argument

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numba import types
from numba.extending import intrinsic

from kernels.common.numba import compiled, inner
from kernels.common.numba_vectors import Vectors, matrices

EPS = 1e-6
# rows of a token's [3, W], and of their gradients
QUERY, KEY, KEEP = range(3)
# rows of a matrix written out in one turn of a loop over them, with sums of their own
TURN = 4
# rows that keep places that are used together from lying a multiple of 4096 bytes apart, which caches take for the same
SPARE = 1


@intrinsic(prefer_literal=True)
def _ask(typing, keys, values, n, state, tokens, written, step):
    """state = decay * state; written[n] = step * (written[n] - key @ state)."""

    def write(context, builder, signature, given):
        v, (wide, tall) = Vectors(context, builder, state.dtype), (keys.literal_value, values.literal_value)
        state_at, tokens_at, written_at = v.pointers([state, tokens, written], given[3:6])
        token_at, written_at = v.matrix(tokens_at, given[2], 3 * wide), v.matrix(written_at, given[2], tall)
        columns = range(0, tall, v.lanes)
        sums = [[v.variable() for _ in columns] for _ in range(TURN)]
        with v.rows(tall, TURN, wide) as (i, row):
            for r in range(TURN):
                key, keep = (v.number(token_at, v.further(i, part * wide + r)) for part in (KEY, KEEP))
                for total, c in zip(sums[r], columns, strict=True):
                    place = v.further(row, r * tall + c)
                    new = v.times(keep, v.load(state_at, place))
                    v.store(new, state_at, place)
                    v.increase(total, key, new)
        for totals, c in zip(zip(*sums, strict=True), columns, strict=True):
            answer = v.sum([builder.load(total) for total in totals])
            v.store(v.times(v.spread(given[6]), builder.fsub(v.load(written_at, c), answer)), written_at, c)
        return context.get_dummy_value()

    return types.void(keys, values, n, state, tokens, written, step), write


@intrinsic(prefer_literal=True)
def _write(typing, keys, values, is_faded, n, state, tokens, written, read):
    """state = decay * state (unless that is done) + key written[n]^T; read[n] = query @ state."""

    def write(context, builder, signature, given):
        v, (wide, tall) = Vectors(context, builder, state.dtype), (keys.literal_value, values.literal_value)
        state_at, *arrays = v.pointers([state, tokens, written, read], given[4:])
        token_at, written_at, read_at = (v.matrix(at, given[3], s) for at, s in zip(arrays, (3 * wide, tall, tall)))  # noqa: B905
        columns = range(0, tall, v.lanes)
        value = [v.load(written_at, c) for c in columns]
        sums = [[v.variable() for _ in columns] for _ in range(TURN)]
        with v.rows(tall, TURN, wide) as (i, row):
            for r in range(TURN):
                query, key, keep = (v.number(token_at, v.further(i, part * wide + r)) for part in (QUERY, KEY, KEEP))
                for m, (total, c) in enumerate(zip(sums[r], columns, strict=True)):
                    place = v.further(row, r * tall + c)
                    before = v.load(state_at, place)
                    new = v.add(before if is_faded.literal_value else v.times(keep, before), key, value[m])
                    v.store(new, state_at, place)
                    v.increase(total, query, new)
        for totals, c in zip(zip(*sums, strict=True), columns, strict=True):
            v.store(v.sum([builder.load(total) for total in totals]), read_at, c)
        return context.get_dummy_value()

    return types.void(keys, values, is_faded, n, state, tokens, written, read), write


@intrinsic(prefer_literal=True)
def _restore(typing, keys, values, is_delta, n, states, after, tokens, errors, step):
    """states[n] = decay * after; errors[n] -= states[n] @ key in the delta rule; after = states[n] + step error key."""

    def write(context, builder, signature, given):
        v, (wide, tall) = Vectors(context, builder, after.dtype), (keys.literal_value, values.literal_value)
        states_at, after_at, tokens_at, errors_at = v.pointers([states, after, tokens, errors], given[4:8])
        states_at, token_at = (
            v.matrix(states_at, given[3], (tall + SPARE) * wide),
            v.matrix(tokens_at, given[3], 3 * wide),
        )
        errors_at, columns = v.matrix(errors_at, given[3], tall), range(0, wide, v.lanes)
        key, keep = ([v.load(token_at, part * wide + c) for c in columns] for part in (KEY, KEEP))
        with v.rows(wide, 1, tall) as (j, row):
            places = [v.further(row, c) for c in columns]
            before = [v.times(a, v.load(after_at, place)) for a, place in zip(keep, places, strict=True)]
            for x, place in zip(before, places, strict=True):
                v.store(x, states_at, place)
            error = v.scalar(errors_at, j)
            if is_delta.literal_value:
                answer = v.across(v.sum([v.times(x, y) for x, y in zip(before, key, strict=True)]))
                error = builder.fsub(error, answer)
                v.put(error, errors_at, j)
            change = v.spread(builder.fmul(given[8], error))
            for x, y, place in zip(before, key, places, strict=True):
                v.store(v.add(x, change, y), after_at, place)
        return context.get_dummy_value()

    return types.void(keys, values, is_delta, n, states, after, tokens, errors, step), write


@intrinsic(prefer_literal=True)
def _adjoint(typing, keys, values, is_delta, n, states, u, tokens, errors, found, do, asked, step):
    """One token back: u, the adjoint of the state after its write, becomes that of the state before its decay.

    found[n] are the gradients of query (without what is written here), key and decay; asked[n] that of what is written.
    """

    def write(context, builder, signature, given):
        v, (wide, tall) = Vectors(context, builder, u.dtype), (keys.literal_value, values.literal_value)
        states_at, u_at, *arrays = v.pointers([states, u, tokens, errors, found, do, asked], given[4:11])
        states_at, sizes = v.matrix(states_at, given[3], (tall + SPARE) * wide), (3 * wide, tall, 3 * wide, tall, tall)
        at = [v.matrix(pointer, given[3], size) for pointer, size in zip(arrays, sizes, strict=True)]
        token_at, errors_at, found_at, do_at, asked_at = at
        columns = range(0, wide, v.lanes)
        query, key, keep = ([v.load(token_at, part * wide + c) for c in columns] for part in (QUERY, KEY, KEEP))
        sums = [[v.variable() for _ in columns] for _ in range(3)]
        with v.rows(wide, 1, tall) as (j, row):
            places = [v.further(row, c) for c in columns]
            out, change = v.number(do_at, j), v.spread(builder.fmul(given[11], v.scalar(errors_at, j)))
            after = [v.add(v.load(u_at, place), out, x) for place, x in zip(places, query, strict=True)]
            answer = v.across(v.sum([v.times(d, y) for d, y in zip(after, key, strict=True)]))
            v.put(answer, asked_at, j)
            back = v.spread(builder.fmul(given[11], answer))
            for m, place in enumerate(places):
                d, x = after[m], v.load(states_at, place)
                v.increase(sums[QUERY][m], out, x)
                v.increase(sums[KEY][m], change, d)
                if is_delta.literal_value:
                    v.increase(sums[KEY][m], builder.fneg(back), x)
                    d = v.take(d, back, key[m])
                v.increase(sums[KEEP][m], d, x)
                v.store(v.times(keep[m], d), u_at, place)
        for part, totals in enumerate(sums):
            for total, c in zip(totals, columns, strict=True):
                v.store(builder.load(total), found_at, part * wide + c)
        return context.get_dummy_value()

    return types.void(keys, values, is_delta, n, states, u, tokens, errors, found, do, asked, step), write


@inner
def _load(tokens, by, rows, t0, many, head, q, k, v, decay, scale, is_normed):
    """Tokens of a chunk: query (scaled), key, decay; values to `rows`; `by` what their lengths were divided by."""
    for n in range(many):
        t = t0 + n
        if is_normed:
            square_q = square_k = q.dtype.type(EPS)
            for i in range(q.shape[2]):
                square_q += q[t, head, i] * q[t, head, i]
                square_k += k[t, head, i] * k[t, head, i]
            by[n, QUERY], by[n, KEY] = q.dtype.type(1) / np.sqrt(square_q), q.dtype.type(1) / np.sqrt(square_k)
        for i in range(q.shape[2]):
            tokens[n, QUERY, i] = scale * by[n, QUERY] * q[t, head, i]
        for i in range(q.shape[2]):
            tokens[n, KEY, i] = by[n, KEY] * k[t, head, i]
        for i in range(q.shape[2] if decay.shape[2] > 0 else 0):
            tokens[n, KEEP, i] = decay[t, head, min(i, decay.shape[2] - 1)]
        for j in range(v.shape[2]):
            rows[n, j] = v[t, head, j]


@inner
def _unload(dq, dk, dg, found, tokens, by, t0, many, head, q, k, along, scale, is_normed):
    """Gradients of what was given from those of a chunk's tokens, before they were scaled and divided."""
    for n in range(many):
        t, of_q, of_k, of_keep = t0 + n, along[n] - along[n], along[n] - along[n], along[n] - along[n]
        # the state that is read is the one after the write
        for i in range(q.shape[2]):
            found[n, QUERY, i] += along[n] * tokens[n, KEY, i]
            of_keep += found[n, KEEP, i]
        if is_normed:
            for i in range(q.shape[2]):
                of_q += found[n, QUERY, i] * q[t, head, i]
                of_k += found[n, KEY, i] * k[t, head, i]
            of_q, of_k = of_q * by[n, QUERY] * by[n, QUERY], of_k * by[n, KEY] * by[n, KEY]
        for i in range(q.shape[2]):
            dq[t, head, i] = scale * by[n, QUERY] * (found[n, QUERY, i] - of_q * q[t, head, i])
        for i in range(q.shape[2]):
            dk[t, head, i] = by[n, KEY] * (found[n, KEY, i] - of_k * k[t, head, i])
        for i in range(dg.shape[2]):
            dg[t, head, i] = of_keep if dg.shape[2] == 1 else found[n, KEEP, i]


@inner
def _copied(out, given, rows, width):
    """out = as much of given as is asked for."""
    for i in range(rows):
        for j in range(width):
            out[i, j] = given[i, j]


@inner
def _turned(out, given):
    """As much of out as there is given = given^T."""
    for j in range(given.shape[1]):
        for i in range(given.shape[0]):
            out[j, i] = given[i, j]


@lru_cache
def loops(keys: int, values: int, is_delta: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Forward and backward for matrices of W x U numbers."""

    @compiled
    def forward(first, last, where, scale, is_normed, q, k, v, beta, decay, starts, out, finals, kept):
        """All tokens of lanes first .. last: writes outputs, last states, and the state before every chunk."""
        firsts, lengths, rows, chunk = where
        heads, wide, tall = q.shape[1], q.shape[2], v.shape[2]
        state, tokens, by = matrices(1, keys, values, q)[0], matrices(chunk, 3, keys, q), np.ones((chunk, 2), q.dtype)
        both = matrices(2, chunk, values, q)
        written, read = both[0], both[1]
        tokens[:] = both[:] = 0
        tokens[:, KEEP] = 1
        for lane in range(first, last):
            s, head = lane // heads, lane % heads
            # what fills the rows up holds no number of another lane
            state[:] = 0
            _copied(state, starts[s, head], wide, tall)
            for c in range((lengths[s] + chunk - 1) // chunk):
                t0, many = firsts[s] + c * chunk, min(chunk, lengths[s] - c * chunk)
                if kept.shape[0] > 0:
                    _copied(kept[rows[s] + c, head], state, wide, tall)
                _load(tokens, by, written, t0, many, head, q, k, v, decay, scale, is_normed)
                for n in range(many):
                    if is_delta:
                        _ask(keys, values, n, state, tokens, written, beta[t0 + n, head])
                    _write(keys, values, is_delta, n, state, tokens, written, read)
                for n in range(many):
                    for j in range(tall):
                        out[t0 + n, head, j] = read[n, j]
            _copied(finals[s, head], state, wide, tall)

    @compiled
    def backward(
        first, last, where, scale, is_normed, q, k, v, beta, decay,
        kept, do, dfinals, dq, dk, dv, dbeta, dg, dstarts,
    ):  # fmt: skip
        """The same lanes from their ends, chunk by chunk: a chunk's states anew from the kept one, then the adjoint."""
        firsts, lengths, rows, chunk = where
        heads, wide, tall, one = q.shape[1], q.shape[2], v.shape[2], q.dtype.type(1)
        states, both = matrices(chunk, values + SPARE, keys, q), matrices(2, values + 3 * SPARE, keys, q)
        u, after, by = both[0], both[1], np.ones((chunk, 2), q.dtype)
        tokens, found, of_v = matrices(chunk, 3, keys, q), matrices(chunk, 3, keys, q), matrices(3, chunk, values, q)
        errors, given, asked, along = of_v[0], of_v[1], of_v[2], np.empty(chunk, q.dtype)
        tokens[:] = of_v[:] = 0
        tokens[:, KEEP] = 1
        for lane in range(first, last):
            s, head = lane // heads, lane % heads
            # what fills the rows up holds no number of another lane
            both[:] = errors[:] = 0
            _turned(u, dfinals[s, head])
            for c in range((lengths[s] + chunk - 1) // chunk - 1, -1, -1):
                t0, many = firsts[s] + c * chunk, min(chunk, lengths[s] - c * chunk)
                _turned(after, kept[rows[s] + c, head])
                _load(tokens, by, errors, t0, many, head, q, k, v, decay, scale, is_normed)
                for n in range(many):
                    for j in range(tall):
                        given[n, j] = do[t0 + n, head, j]
                for n in range(many):
                    step = beta[t0 + n, head] if is_delta else one
                    _restore(keys, values, is_delta, n, states, after, tokens, errors, step)
                for n in range(many - 1, -1, -1):
                    step = beta[t0 + n, head] if is_delta else one
                    _adjoint(keys, values, is_delta, n, states, u, tokens, errors, found, given, asked, step)
                for n in range(many):
                    step, of_step = beta[t0 + n, head] if is_delta else one, one - one
                    along[n] = 0
                    for j in range(tall):
                        along[n] += given[n, j] * step * errors[n, j]
                        of_step += asked[n, j] * errors[n, j]
                        dv[t0 + n, head, j] = step * asked[n, j]
                    if is_delta:
                        dbeta[t0 + n, head] = of_step
                _unload(dq, dk, dg, found, tokens, by, t0, many, head, q, k, along, scale, is_normed)
            _turned(dstarts[s, head], u[:tall, :wide])

    return forward, backward
