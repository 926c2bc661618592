"""The loops of `kernels.common.numba_fused`. Lanes are blocks of rows or of tokens, or the rows of the batch.

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
    width = x_ND.shape[1]
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        x, y, square = x_ND[n], y_ND[n], np.float32(0)
        for d in range(width):
            square += x[d] * x[d]
        scale = np.float32(1) / np.sqrt(square * share + eps)
        for d in range(width):
            y[d] = x[d] * scale * weight_D[d]


@compiled
def normed_backward(first, last, dy_ND, x_ND, weight_D, share, eps, dx_ND, dweight_LD):
    """The size is computed again."""
    width = x_ND.shape[1]
    for lane in range(first, last):
        dweight = dweight_LD[lane]
        for n in range(lane * BLOCK, min((lane + 1) * BLOCK, x_ND.shape[0])):
            dy, x, dx, square, along = dy_ND[n], x_ND[n], dx_ND[n], np.float32(0), np.float32(0)
            for d in range(width):
                square += x[d] * x[d]
                along += dy[d] * weight_D[d] * x[d]
            scale = np.float32(1) / np.sqrt(square * share + eps)
            back = along * share * scale * scale * scale
            for d in range(width):
                dx[d] = dy[d] * weight_D[d] * scale - x[d] * back
                dweight[d] += dy[d] * x[d] * scale


@compiled
def gated(first, last, gate_ND, x_ND, y_ND):
    """silu(gate) * x."""
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        gate, x, y = gate_ND[n], x_ND[n], y_ND[n]
        for d in range(x.size):
            y[d] = gate[d] * sigmoid(gate[d], np.float32(1)) * x[d]


@compiled
def gated_backward(first, last, dy_ND, gate_ND, x_ND, dgate_ND, dx_ND):
    """silu is computed again."""
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        dy, gate, x, dgate, dx = dy_ND[n], gate_ND[n], x_ND[n], dgate_ND[n], dx_ND[n]
        for d in range(x.size):
            share = sigmoid(gate[d], np.float32(1))
            dx[d] = dy[d] * gate[d] * share
            dgate[d] = dy[d] * x[d] * _slope(gate[d], share)


@inner
def _slope(x, share):
    """Of silu at x, where sigmoid(x) is `share`."""
    return share * (np.float32(1) + x * (np.float32(1) - share))


@inner
def _summed(sums, x_TC, tail_PC, weight_JC, t, seen):
    """sums = the taps of token t over what it sees: itself and `seen` tokens before it."""
    sums[:] = np.float32(0)
    for back in range(seen + 1):
        taps = weight_JC[weight_JC.shape[0] - 1 - back]
        row = x_TC[t - back] if t >= back else tail_PC[tail_PC.shape[0] + t - back]
        for c in range(sums.size):
            sums[c] += taps[c] * row[c]


@compiled
def convolved(first, last, x_BTC, tail_BPC, weight_JC, seen_BT, y_BTC):
    """silu of the sums of taps."""
    length, sums = x_BTC.shape[1], np.empty(x_BTC.shape[2], np.float32)
    blocks = (length + BLOCK - 1) // BLOCK
    for lane in range(first, last):
        b, begin = lane // blocks, lane % blocks * BLOCK
        for t in range(begin, min(begin + BLOCK, length)):
            _summed(sums, x_BTC[b], tail_BPC[b], weight_JC, t, seen_BT[b, t])
            y = y_BTC[b, t]
            for c in range(sums.size):
                y[c] = sums[c] * sigmoid(sums[c], np.float32(1))


@compiled
def convolved_backward(first, last, dy_BTC, x_BTC, tail_BPC, weight_JC, seen_BT, dx_BTC, dtail_BPC, dweight_LJC):
    """The sums are computed again; what a lane owes its neighbours, they compute themselves."""
    length, num_before, sums = x_BTC.shape[1], tail_BPC.shape[1], np.empty(x_BTC.shape[2], np.float32)
    nowhere = np.zeros_like(sums)
    blocks = (length + BLOCK - 1) // BLOCK
    for lane in range(first, last):
        b, begin = lane // blocks, lane % blocks * BLOCK
        end = min(begin + BLOCK, length)
        x_TC, tail_PC, dx_TC, dtail_PC = x_BTC[b], tail_BPC[b], dx_BTC[b], dtail_BPC[b]
        dx_TC[begin:end] = np.float32(0)
        # tokens of the next block see the last ones of this
        for t in range(begin, min(end + num_before, length)):
            _summed(sums, x_TC, tail_PC, weight_JC, t, seen_BT[b, t])
            dy = dy_BTC[b, t]
            for c in range(sums.size):
                sums[c] = dy[c] * _slope(sums[c], sigmoid(sums[c], np.float32(1)))
            for back in range(seen_BT[b, t] + 1):
                place, j = t - back, num_before - back
                row, drow = (x_TC[place], dx_TC[place]) if place >= 0 else (tail_PC[place], dtail_PC[place])
                # one loop for both sums is vectorised better than two; what belongs to another block goes nowhere
                drow = drow if begin <= max(place, 0) < end else nowhere
                taps, dtaps = weight_JC[j], dweight_LJC[lane, j] if t < end else nowhere
                for c in range(sums.size):
                    dtaps[c] += sums[c] * row[c]
                    drow[c] += sums[c] * taps[c]


@compiled
def running_sum(first, last, x_BTC, starts_BT, period, y_BTC):
    """Summed in float64."""
    for b in range(first, last):
        total = np.zeros(x_BTC.shape[2])
        for t in range(x_BTC.shape[1]):
            x, y = x_BTC[b, t], y_BTC[b, t]
            if starts_BT[b, t]:
                total[:] = 0
            for c in range(total.size):
                total[c] += x[c]
            if period > 0:
                for c in range(total.size):
                    total[c] -= np.floor(total[c] / period) * period
            for c in range(total.size):
                y[c] = total[c]


@compiled
def running_sum_backward(first, last, dy_BTC, starts_BT, dx_BTC):
    """From the last token to the first."""
    for b in range(first, last):
        total = np.zeros(dy_BTC.shape[2])
        for t in range(dy_BTC.shape[1] - 1, -1, -1):
            dy, dx = dy_BTC[b, t], dx_BTC[b, t]
            for c in range(total.size):
                total[c] += dy[c]
                dx[c] = total[c]
            if starts_BT[b, t]:
                total[:] = 0


@compiled
def turned(first, last, x_ND, cos_ND, sin_ND, y_N2):
    """Cosines in the left half, sines in the right one."""
    width = x_ND.shape[1]
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        x, cos, sin, y = x_ND[n], cos_ND[n], sin_ND[n], y_N2[n]
        for d in range(width):
            y[d] = x[d] * cos[d]
            y[width + d] = x[d] * sin[d]


@compiled
def turned_backward(first, last, dy_N2, x_ND, cos_ND, sin_ND, dx_ND, dangle_ND):
    """cos and sin have the slopes -sin and cos."""
    width = x_ND.shape[1]
    for n in range(first * BLOCK, min(last * BLOCK, x_ND.shape[0])):
        dy, x, cos, sin, dx, dangle = dy_N2[n], x_ND[n], cos_ND[n], sin_ND[n], dx_ND[n], dangle_ND[n]
        for d in range(width):
            dx[d] = dy[d] * cos[d] + dy[width + d] * sin[d]
            dangle[d] = x[d] * (dy[width + d] * cos[d] - dy[d] * sin[d])
