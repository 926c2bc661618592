"""The loops of `kernels.common.numba_fused`. Lanes are blocks of rows or of tokens, or the rows of the batch.

Arrays are read by all their indices: a row that is taken out of one is counted, by an instruction that locks, and costs
more than the row's arithmetic.

Legend: N rows, D width, B batch, T time, P tokens before, C channels, J taps, L lanes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

import numpy as np

from kernels.common.numba import compiled, inner, sigmoid

# rows of a lane: the sums of a block are the same for any number of threads
BLOCK = 256


@compiled
def normed(first, last, x_ND, weight_D, share, eps, y_ND):
    """Rows over their size, times the weight."""
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        square = np.float32(0)
        for d in range(x_ND.shape[1]):
            square += x_ND[n, d] * x_ND[n, d]
        scale = np.float32(1) / np.sqrt(square * share + eps)
        for d in range(x_ND.shape[1]):
            y_ND[n, d] = x_ND[n, d] * scale * weight_D[d]


@compiled
def normed_backward(first, last, dy_ND, x_ND, weight_D, share, eps, dx_ND, dweight_LD):
    """The size is computed again."""
    for lane in range(first, last):
        for n in range(lane * BLOCK, min((lane + 1) * BLOCK, x_ND.shape[0])):
            square, along = np.float32(0), np.float32(0)
            for d in range(x_ND.shape[1]):
                square += x_ND[n, d] * x_ND[n, d]
                along += dy_ND[n, d] * weight_D[d] * x_ND[n, d]
            scale = np.float32(1) / np.sqrt(square * share + eps)
            back = along * share * scale * scale * scale
            for d in range(x_ND.shape[1]):
                dx_ND[n, d] = dy_ND[n, d] * weight_D[d] * scale - x_ND[n, d] * back
                dweight_LD[lane, d] += dy_ND[n, d] * x_ND[n, d] * scale


@compiled
def gated(first, last, gate_ND, x_ND, y_ND):
    """silu(gate) * x."""
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        for d in range(x_ND.shape[1]):
            y_ND[n, d] = gate_ND[n, d] * sigmoid(gate_ND[n, d], np.float32(1)) * x_ND[n, d]


@compiled
def gated_backward(first, last, dy_ND, gate_ND, x_ND, dgate_ND, dx_ND):
    """silu is computed again."""
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        for d in range(x_ND.shape[1]):
            gate = gate_ND[n, d]
            share = sigmoid(gate, np.float32(1))
            dx_ND[n, d] = dy_ND[n, d] * gate * share
            dgate_ND[n, d] = dy_ND[n, d] * x_ND[n, d] * _slope(gate, share)


@inner
def _slope(x, share):
    """Of silu at x, where sigmoid(x) is `share`."""
    return share * (np.float32(1) + x * (np.float32(1) - share))


@inner
def _sums(sums_TC, b, begin, end, x_BTC, tail_BPC, weight_JC, seen_BT):
    """Rows of the taps of tokens begin .. end over what each sees: itself and `seen` tokens before it."""
    own = weight_JC.shape[0] - 1
    for t in range(begin, end):
        n = t - begin
        for c in range(x_BTC.shape[2]):
            sums_TC[n, c] = weight_JC[own, c] * x_BTC[b, t, c]
        for back in range(1, min(seen_BT[b, t], t) + 1):
            for c in range(x_BTC.shape[2]):
                sums_TC[n, c] += weight_JC[own - back, c] * x_BTC[b, t - back, c]
        for back in range(t + 1, seen_BT[b, t] + 1):
            for c in range(x_BTC.shape[2]):
                sums_TC[n, c] += weight_JC[own - back, c] * tail_BPC[b, own + t - back, c]


@compiled
def convolved(first, last, x_BTC, tail_BPC, weight_JC, seen_BT, y_BTC):
    """silu of the sums of taps."""
    length, width = x_BTC.shape[1:]
    sums_TC, blocks = np.empty((BLOCK, width), np.float32), (length + BLOCK - 1) // BLOCK
    for lane in range(first, last):
        b, begin = lane // blocks, lane % blocks * BLOCK
        end = min(begin + BLOCK, length)
        _sums(sums_TC, b, begin, end, x_BTC, tail_BPC, weight_JC, seen_BT)
        for t in range(begin, end):
            for c in range(width):
                x = sums_TC[t - begin, c]
                y_BTC[b, t, c] = x * sigmoid(x, np.float32(1))


@compiled
def convolved_backward(first, last, dy_BTC, x_BTC, tail_BPC, weight_JC, seen_BT, dx_BTC, dtail_BPC, dweight_LJC):
    """The sums are computed again; what a lane owes its neighbours, they compute themselves."""
    length, width, own = x_BTC.shape[1], x_BTC.shape[2], tail_BPC.shape[1]
    dsums_TC, blocks = np.empty((BLOCK + own, width), np.float32), (length + BLOCK - 1) // BLOCK
    for lane in range(first, last):
        b, begin = lane // blocks, lane % blocks * BLOCK
        # tokens of the next block see the last ones of this
        end, until = min(begin + BLOCK, length), min(begin + BLOCK + own, length)
        _sums(dsums_TC, b, begin, until, x_BTC, tail_BPC, weight_JC, seen_BT)
        for t in range(begin, until):
            for c in range(width):
                x = dsums_TC[t - begin, c]
                dsums_TC[t - begin, c] = dy_BTC[b, t, c] * _slope(x, sigmoid(x, np.float32(1)))
        for t in range(begin, end):
            n = t - begin
            for c in range(width):
                dx_BTC[b, t, c] = dsums_TC[n, c] * weight_JC[own, c]
                dweight_LJC[lane, own, c] += dsums_TC[n, c] * x_BTC[b, t, c]
            for on in range(1, min(own, length - 1 - t) + 1):
                if seen_BT[b, t + on] >= on:
                    for c in range(width):
                        dx_BTC[b, t, c] += dsums_TC[n + on, c] * weight_JC[own - on, c]
            for back in range(1, min(seen_BT[b, t], t) + 1):
                for c in range(width):
                    dweight_LJC[lane, own - back, c] += dsums_TC[n, c] * x_BTC[b, t - back, c]
            for back in range(t + 1, seen_BT[b, t] + 1):
                for c in range(width):
                    dweight_LJC[lane, own - back, c] += dsums_TC[n, c] * tail_BPC[b, own + t - back, c]
                    dtail_BPC[b, own + t - back, c] += dsums_TC[n, c] * weight_JC[own - back, c]


@compiled
def running_sum(first, last, x_BTC, starts_BT, period, y_BTC):
    """Summed in float64."""
    width, total = x_BTC.shape[2], np.empty(x_BTC.shape[2])
    for b in range(first, last):
        total[:] = 0
        for t in range(x_BTC.shape[1]):
            if starts_BT[b, t]:
                total[:] = 0
            for c in range(width):
                total[c] += x_BTC[b, t, c]
            if period > 0:
                for c in range(width):
                    total[c] -= np.floor(total[c] / period) * period
            for c in range(width):
                y_BTC[b, t, c] = total[c]


@compiled
def running_sum_backward(first, last, dy_BTC, starts_BT, dx_BTC):
    """From the last token to the first."""
    width, total = dy_BTC.shape[2], np.empty(dy_BTC.shape[2])
    for b in range(first, last):
        total[:] = 0
        for t in range(dy_BTC.shape[1] - 1, -1, -1):
            for c in range(width):
                total[c] += dy_BTC[b, t, c]
                dx_BTC[b, t, c] = total[c]
            if starts_BT[b, t]:
                total[:] = 0


@compiled
def turned(first, last, x_ND, cos_ND, sin_ND, y_N2):
    """Cosines in the left half, sines in the right one."""
    width = x_ND.shape[1]
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        for d in range(width):
            y_N2[n, d] = x_ND[n, d] * cos_ND[n, d]
            y_N2[n, width + d] = x_ND[n, d] * sin_ND[n, d]


@compiled
def turned_backward(first, last, dy_N2, x_ND, cos_ND, sin_ND, dx_ND, dangle_ND):
    """cos and sin have the slopes -sin and cos."""
    width = x_ND.shape[1]
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        for d in range(width):
            left, right = dy_N2[n, d], dy_N2[n, width + d]
            dx_ND[n, d] = left * cos_ND[n, d] + right * sin_ND[n, d]
            dangle_ND[n, d] = x_ND[n, d] * (right * cos_ND[n, d] - left * sin_ND[n, d])
