"""What the loops over pieces of a neural memory share: activations, slopes of the loss, and how gates stack up.

Everything has tokens along its rows: a vector holds one number of as many tokens, and what a token weighs is a product
of vectors. Legend: c tokens of a piece, of which n are there; K/V key/value width.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

import math

import numpy as np
from numba import types
from numba.extending import overload

from kernels.common.numba import called, exp, inner, sigmoid
from kernels.neural_memory.model import NORM_EPS

GELU, SILU = range(2)
L2, HUBER, LP = range(3)

# P(X < -x) = exp(-x^2 / 2) T p(T) for x >= 0, T = 1 / (1 + 0.4 x): a minimax fit of relative error 1.5e-8
_BEND, _NARROW_ONE, _HALF = np.float32(0.4), np.float32(1), np.float32(0.5)
_FIRST = (3.190469369292259e-2, -0.17513366043567657, 0.37835967540740967, -0.3687804043292999, 0.11513788998126984)
_LAST = (-2.4523813277482986e-2, 9.054581075906754e-2, 0.13330461084842682, 0.1596084088087082, 0.15957681834697723)
_TAIL = tuple(map(np.float32, _FIRST + _LAST))
_PEAK32, _PEAK = np.float32(1 / math.sqrt(2 * math.pi)), 1 / math.sqrt(2 * math.pi)


def normal(x):
    """The share of a normal distribution below x, and its density there."""
    raise NotImplementedError


@inner
def _normal32(x):
    e, t = exp(-_HALF * x * x), _NARROW_ONE / (_NARROW_ONE + _BEND * abs(x))
    p = (((_TAIL[0] * t + _TAIL[1]) * t + _TAIL[2]) * t + _TAIL[3]) * t + _TAIL[4]
    p = ((((p * t + _TAIL[5]) * t + _TAIL[6]) * t + _TAIL[7]) * t + _TAIL[8]) * t + _TAIL[9]
    tail = e * (t * p)
    return tail if x < 0 else _NARROW_ONE - tail, _PEAK32 * e


@overload(normal, inline="never")
def _normal(x):
    if x == types.float32:
        return lambda x: _normal32(x)
    return lambda x: (0.5 * math.erfc(-x * math.sqrt(0.5)), _PEAK * math.exp(-0.5 * x * x))


@called
def activated(out, given, kind):
    """out = gelu or silu of given."""
    one = out.dtype.type(1)
    for i in range(out.shape[0]):
        if kind == GELU:
            for t in range(out.shape[1]):
                x = given[i, t]
                out[i, t] = x * normal(x)[0]
        else:
            for t in range(out.shape[1]):
                out[i, t] = given[i, t] * sigmoid(given[i, t], one)


@called
def bent(out, slope, bend, given, kind):
    """The activation, its derivative and the derivative of that."""
    one = out.dtype.type(1)
    two = one + one
    for i in range(out.shape[0]):
        if kind == GELU:
            for t in range(out.shape[1]):
                x = given[i, t]
                below, density = normal(x)
                out[i, t] = x * below
                slope[i, t] = below + x * density
                bend[i, t] = density * (two - x * x)
        else:
            for t in range(out.shape[1]):
                x = given[i, t]
                s = sigmoid(x, one)
                out[i, t] = x * s
                slope[i, t] = s * (one + x * (one - s))
                bend[i, t] = s * (one - s) * (two + x * (one - two * s))


@inner
def _pull(error, loss, threshold):
    """d loss / d error."""
    if loss == L2:
        return error
    if loss == HUBER:
        return min(max(error, -threshold), threshold)
    one = threshold / threshold
    if error == 0:
        return one - one
    return math.copysign(abs(error) ** (threshold - one), error)


@inner
def _give(error, loss, threshold):
    """d^2 loss / d error^2."""
    one = threshold / threshold
    if loss == L2:
        return one
    if loss == HUBER:
        return one if abs(error) <= threshold else one - one
    if error == 0:
        return one - one
    return (threshold - one) * abs(error) ** (threshold - one - one)


@called
def _centred(out, given, y, inverse, width):
    """The gradient `given` by the output y of a LayerNorm, taken to its input."""
    one = out.dtype.type(1)
    share = one / out.dtype.type(width)
    for t in range(out.shape[1]):
        mean, along = one - one, one - one
        for j in range(width):
            mean += given[j, t]
            along += given[j, t] * y[j, t]
        mean, along = share * mean, share * along
        for j in range(width):
            out[j, t] = inverse[t] * (given[j, t] - mean - along * y[j, t])


@inner
def slope(e, y, inverse, x, k, v, step, norm, loss, threshold, has_norm):
    """e [V, c]: the step times the slope of the loss at the memory's last product x; y and inverse are the norm's.

    norm [2, V]: gamma and bias of a memory that answers k + gamma LayerNorm(x) + bias.
    """
    width, one = norm.shape[1], x.dtype.type(1)
    if not has_norm:
        for j in range(width):
            for t in range(x.shape[1]):
                e[j, t] = step[t] * _pull(x[j, t] - v[j, t], loss, threshold)
        return
    share = one / x.dtype.type(width)
    for t in range(x.shape[1]):
        mean, square = one - one, one - one
        for j in range(width):
            mean += x[j, t]
        mean *= share
        for j in range(width):
            y[j, t] = x[j, t] - mean
            square += y[j, t] * y[j, t]
        inverse[t] = one / math.sqrt(share * square + x.dtype.type(NORM_EPS))
    for j in range(width):
        gamma, bias = norm[0, j], norm[1, j]
        for t in range(x.shape[1]):
            y[j, t] *= inverse[t]
            e[j, t] = step[t] * gamma * _pull(k[j, t] + gamma * y[j, t] + bias - v[j, t], loss, threshold)
    _centred(e, e, y, inverse, width)


@inner
def slope_back(dx, dv, dk, dstep, dnorm, de, e, y, inverse, x, k, v, step, norm, loss, threshold, has_norm, n):
    """From de to dx and dv, onto dk and dnorm [2, V], and to dstep [c]; dx and dv hold what is in between.

    Behind a norm e = J delta, J the derivative of the norm, which is symmetric, and delta the gradient by y.
    """
    width, one = norm.shape[1], x.dtype.type(1)
    dstep[:] = one - one
    if not has_norm:
        for j in range(width):
            for t in range(x.shape[1]):
                error = x[j, t] - v[j, t]
                dstep[t] += de[j, t] * _pull(error, loss, threshold)
                dx[j, t] = step[t] * _give(error, loss, threshold) * de[j, t]
                dv[j, t] = -dx[j, t]
        return
    share = one / x.dtype.type(width)
    _centred(dx, de, y, inverse, width)
    for t in range(n):
        delta_y, de_y, de_e, mean, along = dstep[t], dstep[t], dstep[t], dstep[t], dstep[t]
        for j in range(width):
            pull = _pull(k[j, t] + norm[0, j] * y[j, t] + norm[1, j] - v[j, t], loss, threshold)
            delta_y += step[t] * norm[0, j] * pull * y[j, t]
            de_y += de[j, t] * y[j, t]
            de_e += de[j, t] * e[j, t]
        factor = share * inverse[t]
        for j in range(width):
            gamma, of_delta = norm[0, j], dx[j, t]
            error = k[j, t] + gamma * y[j, t] + norm[1, j] - v[j, t]
            pull = _pull(error, loss, threshold)
            of_error = step[t] * gamma * of_delta * _give(error, loss, threshold)
            dstep[t] += of_delta * gamma * pull
            dnorm[0, j] += step[t] * of_delta * pull + of_error * y[j, t]
            dnorm[1, j] += of_error
            dv[j, t] = -of_error
            dk[j, t] += of_error
            dx[j, t] = gamma * of_error - factor * (de[j, t] * delta_y + step[t] * gamma * pull * de_y)
            mean += dx[j, t]
            along += dx[j, t] * y[j, t]
        # the deviation is a function of x too: what comes through it goes along y
        for j in range(width):
            dx[j, t] = inverse[t] * (dx[j, t] - share * (mean + along * y[j, t])) - factor * de_e * y[j, t]
