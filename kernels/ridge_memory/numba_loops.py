"""The loops of `numba`, and the products in them; in one file, so that machine code that is kept follows its text.

A step of a solve reads H_t once and waits for the step before; so it is written in whole vectors whose sums stay in
registers, and a few tokens are solved in turns.

Legend: W width K filled up to whole vectors with zeros, a constant of the loops; R tokens, S sequences, H heads, N
chunks; tokens [R, H, K], beta and decay [R, H], states [S, H, K, K], kept ones [N, H, K, K]; one matrix [W, W].
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
# numba compiles a function for the types that come, and gives an intrinsic its first argument

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numba import types
from numba.extending import intrinsic

from kernels.common.numba import compiled, inner
from kernels.common.numba_vectors import HAS_LONG, Vectors, matrices

# vectors summed at once: enough to hide what an addition takes, few enough for the registers
SUMS = 8 if HAS_LONG else 4
# rows written out in one turn of a loop over them
ROWS = 8
# tokens solved in turns, fewer where their matrices would not stay in the nearest cache, in bytes
TURNS, NEAR = 4, 2**15


@intrinsic(prefer_literal=True)
def _advance(typing, width, before, x, start, matrix, rest, omega, keep, step):
    """before = rest before + omega start + keep x - step (x @ matrix)."""

    def write(context, builder, signature, given):
        v, size = Vectors(context, builder, before.dtype), width.literal_value
        before_at, x_at, start_at, matrix_at = v.pointers(signature.args[1:5], given[1:5])
        rest, omega, keep, step = map(v.spread, given[5:])
        columns = range(0, size, v.lanes)
        for block in (columns[n : n + SUMS] for n in range(0, len(columns), SUMS)):
            ways = SUMS // len(block)
            sums = {c: [v.variable() for _ in range(ways)] for c in block}
            with v.rows(size, ROWS) as (i, row):
                for n in range(ROWS):
                    factor = v.number(x_at, v.further(i, n))
                    for c in block:
                        v.increase(sums[c][n % ways], factor, v.load(matrix_at, v.further(row, n * size + c)))
            for c in block:
                product = v.sum([builder.load(total) for total in sums[c]])
                ahead = builder.fneg(v.times(product, step))
                for factor, pointer in ((rest, before_at), (omega, start_at), (keep, x_at)):
                    ahead = v.add(ahead, factor, v.load(pointer, c))
                v.store(ahead, before_at, c)
        return context.get_dummy_value()

    return types.void(width, before, x, start, matrix, rest, omega, keep, step), write


@intrinsic(prefer_literal=True)
def _walk(typing, width, after, before, key, decay, beta):
    """after = decay before + beta key key^T; returns |after|^2."""

    def write(context, builder, signature, given):
        v, size = Vectors(context, builder, after.dtype), width.literal_value
        after_at, before_at, key_at = v.pointers(signature.args[1:4], given[1:4])
        decay, beta = map(v.spread, given[4:])
        columns = {c: (v.load(key_at, c), v.variable()) for c in range(0, size, v.lanes)}
        # a loop of the machine: of rows written out the compiler puts off the squares, and has no room for so many
        with v.rows(size) as (i, row):
            factor = v.times(beta, v.number(key_at, i))
            for c, (keys, squares) in columns.items():
                place = v.further(row, c)
                new = v.add(v.times(factor, keys), decay, v.load(before_at, place))
                v.store(new, after_at, place)
                v.increase(squares, new, new)
        return v.across(v.sum([builder.load(squares) for _, squares in columns.values()]))

    return after.dtype(width, after, before, key, decay, beta), write


@intrinsic(prefer_literal=True)
def _walk_back(typing, width, adjoint, after, before, x, z, key, product, decay, of_norm):
    """adjoint = decay adjoint - (x z^T + z x^T) / 2 + of_norm after, product = adjoint key; gives <adjoint, before>."""

    def write(context, builder, signature, given):
        v, size = Vectors(context, builder, adjoint.dtype), width.literal_value
        adjoint_at, after_at, before_at, x_at, z_at, key_at, product_at = v.pointers(signature.args[1:8], given[1:8])
        decay, of_norm = map(v.spread, given[8:])
        columns = range(0, size, v.lanes)
        xs, zs = ([v.times(v.constant(-0.5), v.load(pointer, c)) for c in columns] for pointer in (x_at, z_at))
        products, dots = ([v.variable() for _ in columns] for _ in "12")
        with v.rows(size) as (i, row):
            of_x, of_z, factor = v.number(x_at, i), v.number(z_at, i), v.number(key_at, i)
            for n, c in enumerate(columns):
                place = v.further(row, c)
                new = v.add(v.times(decay, v.load(adjoint_at, place)), of_norm, v.load(after_at, place))
                new = v.add(v.add(new, of_x, zs[n]), of_z, xs[n])
                v.store(new, adjoint_at, place)
                v.increase(products[n], factor, new)
                v.increase(dots[n], v.load(before_at, place), new)
        for n, c in enumerate(columns):
            v.store(builder.load(products[n]), product_at, c)
        return v.across(v.sum([builder.load(dot) for dot in dots]))

    return adjoint.dtype(width, adjoint, after, before, x, z, key, product, decay, of_norm), write


@inner
def _room(turns, width, like):
    """What a solve works in: iterates and those before, right sides, and four numbers of every token."""
    iterates, sides = np.empty((2, turns, width), like.dtype), np.empty((turns, width), like.dtype)
    return iterates, sides, np.empty((turns, 4), like.dtype)


@inner
def _fill(width, row, given):
    """row = given, then zeros."""
    nothing = row.dtype.type(0)
    for j in range(width):
        row[j] = given[j] if j < given.size else nothing


@inner
def _fill_matrix(width, matrix, given):
    nothing = matrix.dtype.type(0)
    for i in range(width):
        for j in range(width):
            matrix[i, j] = given[i, j] if max(i, j) < given.shape[0] else nothing


@inner
def _copy(out, given, factor):
    """out = factor given, as much of it as there is room for, of matrices."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = factor * given[i, j]


@inner
def _solve(width, many, matrices, norms, rhs, begin, head, room, how):
    """Chebyshev as in `chunked` for `many` tokens from `begin` on; says which half of the iterates is the last."""
    x, start, numbers = room
    ratio, floor, steps = how
    one, half, four = x.dtype.type(1), x.dtype.type(0.5), x.dtype.type(4)
    for n in range(many):
        strength, radius = ratio * norms[n] + floor, half * norms[n]
        # the spectrum of H + strength lies in [strength, strength + |H|]; all is divided by the middle of that
        step = one / (strength + radius)
        numbers[n, 0], numbers[n, 1] = step, one - strength * step
        numbers[n, 2], numbers[n, 3] = (radius * step) ** 2, 2
        _fill(width, start[n], rhs[begin + n, head])
        for j in range(width):
            start[n, j] *= step
            x[0, n, j] = start[n, j]
            x[1, n, j] = 0
    for done in range(steps - 1):
        now = done % 2
        for n in range(many):
            omega = four / (four - numbers[n, 2] * numbers[n, 3])
            numbers[n, 3] = omega
            step, keep = omega * numbers[n, 0], omega * numbers[n, 1]
            _advance(width, x[1 - now, n], x[now, n], start[n], matrices[n], one - omega, omega, keep, step)
    return (steps - 1) % 2


@lru_cache
def loops(width: int, size: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Forward and backward for heads filled up to this width, of numbers of so many bytes."""
    turns = max(1, min(TURNS, NEAR // (width * width * size)))

    @compiled
    def forward(first, last, where, tokens, how, q, starts, kept, out, finals):
        firsts, lengths, rows, chunk = where
        k, beta, decay = tokens
        heads, one = k.shape[1], k.dtype.type(1)
        h, room = matrices(turns, width, width, k), _room(turns, width, k)
        norms, key = np.empty(turns, k.dtype), np.empty(width, k.dtype)
        for lane in range(first, last):
            s, head = lane // heads, lane % heads
            # the state before a group of tokens is where the last of the group before was
            _fill_matrix(width, h[turns - 1], starts[s, head])
            for done in range(0, lengths[s], turns):
                many, begin = min(turns, lengths[s] - done), firsts[s] + done
                for n in range(many):
                    before, t = h[(n + turns - 1) % turns], begin + n
                    if kept.size and (done + n) % chunk == 0:
                        _copy(kept[rows[s] + (done + n) // chunk, head], before, one)
                    _fill(width, key, k[t, head])
                    norms[n] = np.sqrt(_walk(width, h[n], before, key, decay[t, head], beta[t, head]))
                at = _solve(width, many, h, norms, q, begin, head, room, how)
                for n in range(many):
                    for j in range(k.shape[2]):
                        out[begin + n, head, j] = room[0][at, n, j]
            _copy(finals[s, head], h[(lengths[s] + turns - 1) % turns], one)

    @compiled
    def backward(first, last, where, tokens, how, x, kept, dx, dfinals, dq, dk, dbeta, dg, dstarts):
        firsts, lengths, rows, chunk = where
        k, beta, decay = tokens
        heads, keys, one = k.shape[1], k.shape[2], k.dtype.type(1)
        h, room, adjoint = matrices(chunk + 1, width, width, k), _room(turns, width, k), matrices(1, width, width, k)[0]
        norms, key = np.empty(chunk, k.dtype), np.empty(width, k.dtype)
        solution, product = np.empty(width, k.dtype), np.empty(width, k.dtype)
        for lane in range(first, last):
            s, head = lane // heads, lane % heads
            _fill_matrix(width, adjoint, dfinals[s, head])
            later = one
            for piece in range((lengths[s] + chunk - 1) // chunk - 1, -1, -1):
                begin, size = firsts[s] + piece * chunk, min(chunk, lengths[s] - piece * chunk)
                _fill_matrix(width, h[0], kept[rows[s] + piece, head])
                for n in range(size):
                    t = begin + n
                    _fill(width, key, k[t, head])
                    norms[n] = np.sqrt(_walk(width, h[n + 1], h[n], key, decay[t, head], beta[t, head]))
                for group in range((size - 1) // turns * turns, -1, -turns):
                    many = min(turns, size - group)
                    at = _solve(width, many, h[group + 1 :], norms[group:], dx, begin + group, head, room, how)
                    for n in range(group + many - 1, group - 1, -1):
                        t, z, dot = begin + n, room[0][at, n - group], one - one
                        _fill(width, key, k[t, head])
                        _fill(width, solution, x[t, head])
                        for j in range(keys):
                            dq[t, head, j] = z[j]
                            dot += z[j] * solution[j]
                        # where there is no H yet, lambda does not move
                        of_norm = -how[0] * dot / norms[n] if norms[n] != 0 else one - one
                        dot = _walk_back(width, adjoint, h[n + 1], h[n], solution, z, key, product, later, of_norm)
                        later, of_beta = decay[t, head], one - one
                        for j in range(keys):
                            dk[t, head, j] = (one + one) * beta[t, head] * product[j]
                            of_beta += key[j] * product[j]
                        dbeta[t, head], dg[t, head] = of_beta, later * dot
            _copy(dstarts[s, head], adjoint, later)

    return forward, backward
