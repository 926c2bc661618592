"""The loops of `numba`, and the cells in them; in one file, so that machine code that is kept follows its text.

A step is a product with the recurrent weights and a few loops over the units. Those that touch few arrays vectorise, so
the backward has the gates first, over the recurrent pre-activations, then what the adjoint needs.

Legend: R tokens, S sequences, G gates, P parts of the state, H heads, D width; x [R, G, H, D], states [P, R, H, D], r
[H, D, G * D]; recurrent, work and out of one step [G * D], gate after gate.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

import numpy as np

from kernels.common.numba import along, compiled, copy, exp, inner, log_sigmoid, onto, sigmoid, tanh

GRU, LSTM, SLSTM, SLSTM_EXP = range(4)


@inner
def _gru(x, t, head, recurrent, h, one):
    width = h.size
    for d in range(width):
        reset = sigmoid(x[t, 0, head, d] + recurrent[d], one)
        z = sigmoid(x[t, 1, head, d] + recurrent[width + d], one)
        n = tanh(x[t, 2, head, d] + reset * recurrent[2 * width + d])
        h[d] = n + z * (h[d] - n)


@inner
def _gru_back(x, t, head, recurrent, h, u, work, out, one):
    """Adjoint u of h before the step, without what comes through `out`; work holds the gradient of the candidate."""
    width = h.size
    for d in range(width):
        reset = sigmoid(x[t, 0, head, d] + recurrent[d], one)
        work[d] = tanh(x[t, 2, head, d] + reset * recurrent[2 * width + d])
        recurrent[d] = reset
        recurrent[width + d] = sigmoid(x[t, 1, head, d] + recurrent[width + d], one)
    for d in range(width):
        reset, z, n = recurrent[d], recurrent[width + d], work[d]
        into_n = u[d] * (one - z) * (one - n * n)
        out[d] = into_n * recurrent[2 * width + d] * reset * (one - reset)
        out[width + d] = u[d] * (h[d] - n) * z * (one - z)
        out[2 * width + d] = into_n * reset
        work[d] = into_n
        u[d] *= z


@inner
def _lstm(x, t, head, recurrent, state, h, one):
    width = h.size
    for d in range(width):
        i = sigmoid(x[t, 0, head, d] + recurrent[d], one)
        f = sigmoid(x[t, 1, head, d] + recurrent[width + d], one)
        g = tanh(x[t, 2, head, d] + recurrent[2 * width + d])
        o = sigmoid(x[t, 3, head, d] + recurrent[3 * width + d], one)
        c = f * state[0, d] + i * g
        state[0, d], h[d] = c, o * tanh(c)


@inner
def _lstm_back(x, t, head, recurrent, state, states, adjoint, u, work, out, one):
    width = u.size
    for d in range(width):
        recurrent[d] = sigmoid(x[t, 0, head, d] + recurrent[d], one)
        recurrent[width + d] = sigmoid(x[t, 1, head, d] + recurrent[width + d], one)
        recurrent[2 * width + d] = tanh(x[t, 2, head, d] + recurrent[2 * width + d])
        recurrent[3 * width + d] = sigmoid(x[t, 3, head, d] + recurrent[3 * width + d], one)
        work[d] = tanh(states[0, t, head, d])
    for d in range(width):
        i, f, g, o = recurrent[d], recurrent[width + d], recurrent[2 * width + d], recurrent[3 * width + d]
        into_c = adjoint[0, d] + u[d] * o * (one - work[d] * work[d])
        out[d] = into_c * g * i * (one - i)
        out[width + d] = into_c * state[0, d] * f * (one - f)
        out[2 * width + d] = into_c * i * (one - g * g)
        out[3 * width + d] = u[d] * work[d] * o * (one - o)
        adjoint[0, d] = into_c * f


@inner
def _slstm(x, t, head, recurrent, state, h, is_sigmoid, one):
    width, nothing = h.size, h.dtype.type(-np.inf)
    for d in range(width):
        i = x[t, 0, head, d] + recurrent[d]
        f = x[t, 1, head, d] + recurrent[width + d]
        z = tanh(x[t, 2, head, d] + recurrent[2 * width + d])
        o = sigmoid(x[t, 3, head, d] + recurrent[3 * width + d], one)
        log_f = log_sigmoid(f, one)
        carried = (log_f if is_sigmoid else f) + state[2, d]
        # nothing is carried from an empty memory
        carried = nothing if state[1, d] == 0 else carried
        top = carried if carried >= i else i
        keep, write = exp(carried - top), exp(i - top)
        c, n = keep * state[0, d] + write * z, keep * state[1, d] + write
        state[0, d], state[1, d], state[2, d], h[d] = c, n, top, o * c / n


@inner
def _slstm_back(x, t, head, recurrent, state, states, adjoint, u, work, out, is_sigmoid, one):
    width, nothing = u.size, u.dtype.type(-np.inf)
    for d in range(width):
        i = x[t, 0, head, d] + recurrent[d]
        f = x[t, 1, head, d] + recurrent[width + d]
        log_f, into_f = log_sigmoid(f, one), one - sigmoid(f, one)
        carried = (log_f if is_sigmoid else f) + state[2, d]
        carried = nothing if state[1, d] == 0 else carried
        top = states[2, t, head, d]
        recurrent[d], recurrent[width + d] = exp(i - top), exp(carried - top)
        work[d] = one if carried >= i else one - one
        work[width + d] = into_f if is_sigmoid else one
    for d in range(width):
        recurrent[2 * width + d] = tanh(x[t, 2, head, d] + recurrent[2 * width + d])
        recurrent[3 * width + d] = sigmoid(x[t, 3, head, d] + recurrent[3 * width + d], one)
        # h = o times this ratio
        work[2 * width + d] = states[0, t, head, d] / states[1, t, head, d]
        work[3 * width + d] = u[d] / states[1, t, head, d]
    for d in range(width):
        write, keep, z, o = recurrent[d], recurrent[width + d], recurrent[2 * width + d], recurrent[3 * width + d]
        is_carried, ratio, share = work[d], work[2 * width + d], work[3 * width + d] * o
        into_c, into_n = adjoint[0, d] + share, adjoint[1, d] - share * ratio
        through = keep * (state[0, d] * into_c + state[1, d] * into_n)
        written = write * (z * into_c + into_n)
        # what is left of the maximum's gradient goes to whichever of the two it is
        left = adjoint[2, d] - through - written
        into_m = through + left * is_carried
        out[d] = written + left * (one - is_carried)
        out[width + d] = into_m * work[width + d]
        out[2 * width + d] = into_c * write * (one - z * z)
        out[3 * width + d] = u[d] * ratio * o * (one - o)
        adjoint[0, d], adjoint[1, d], adjoint[2, d] = into_c * keep, into_n * keep, into_m


@compiled
def forward(first, last, firsts, lengths, forgets, cell, x, r, bias, starts, states, finals):
    """All tokens of lanes first .. last, sequence by sequence and head by head: writes states and last states."""
    parts, _, heads, width = states.shape
    one = r.dtype.type(1)
    recurrent, state = np.empty(r.shape[2], r.dtype), np.empty((parts, width), r.dtype)
    for lane in range(first, last):
        s, head = lane // heads, lane % heads
        h = state[parts - 1]
        copy(state, starts[s, :, head])
        for t in range(firsts[s], firsts[s] + lengths[s]):
            if forgets[t]:
                state[:] = 0
            recurrent[:] = bias[head]
            onto(recurrent, h, r[head])
            if cell == GRU:
                _gru(x, t, head, recurrent, h, one)
            elif cell == LSTM:
                _lstm(x, t, head, recurrent, state, h, one)
            else:
                _slstm(x, t, head, recurrent, state, h, cell == SLSTM, one)
            copy(states[:, t, head], state)
        copy(finals[s, :, head], state)


@compiled
def backward(
    first, last, firsts, lengths, forgets, cell, x, r, bias, starts, states, dh, dfinals, dx, dpre, before, dstarts
):
    """The adjoint through the same lanes: writes dx, the gradient of h R + b, the h before each token, and dstarts."""
    parts, _, heads, width = states.shape
    one = r.dtype.type(1)
    recurrent, work = np.empty(r.shape[2], r.dtype), np.empty(r.shape[2], r.dtype)
    state, adjoint, u = np.empty((parts, width), r.dtype), np.empty((parts, width), r.dtype), np.empty(width, r.dtype)
    for lane in range(first, last):
        s, head = lane // heads, lane % heads
        h = state[parts - 1]
        copy(adjoint, dfinals[s, :, head])
        u[:] = adjoint[parts - 1]
        for t in range(firsts[s] + lengths[s] - 1, firsts[s] - 1, -1):
            copy(state, starts[s, :, head] if t == firsts[s] else states[:, t - 1, head])
            if forgets[t]:
                state[:] = 0
            before[head, t] = h
            recurrent[:] = bias[head]
            onto(recurrent, h, r[head])
            out = dpre[head, t]
            u += dh[t, head]
            if cell == GRU:
                _gru_back(x, t, head, recurrent, h, u, work, out, one)
            elif cell == LSTM:
                _lstm_back(x, t, head, recurrent, state, states, adjoint, u, work, out, one)
            else:
                _slstm_back(x, t, head, recurrent, state, states, adjoint, u, work, out, cell == SLSTM, one)
            for k in range(x.shape[1]):
                for d in range(width):
                    # into the GRU's candidate the input goes beside the reset gate, the state through it
                    dx[t, k, head, d] = work[d] if cell == GRU and k == 2 else out[k * width + d]
            if cell != GRU:
                u[:] = 0
            along(u, out, r[head])
            if forgets[t]:
                adjoint[:] = 0
                u[:] = 0
        adjoint[parts - 1] = u
        copy(dstarts[s, :, head], adjoint)
