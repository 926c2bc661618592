"""The M2RNN on a CPU as compiled loops: every sequence and head walks through its tokens alone, its state row by row.

States are kept every C steps, and the steps between computed again in the backward.

Legend: S sequences, R tokens, H heads, K key and V value width, C chunk; tokens [R, H, K or V], states [H, K, V].
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

import numpy as np
import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.numba import along, array, compiled, copy, inner, onto, places, spread, tanh
from kernels.common.varlen import num_chunks


@inner
def _candidate(row, i, t, head, k, v, state, w):
    """Row i of Z before its tanh."""
    for j in range(row.size):
        row[j] = k[t, head, i] * v[t, head, j]
    onto(row, state[i], w[head])


@compiled
def _forward(first, last, firsts, lengths, rows, forgets, chunk, q, k, v, f, w, starts, out, finals, kept):
    (heads, values), keys = v.shape[1:], q.shape[2]
    state, row = np.empty((keys, values), w.dtype), np.empty(values, w.dtype)
    for lane in range(first, last):
        s, head = lane // heads, lane % heads
        copy(state, starts[s, head])
        for n in range(lengths[s]):
            t = firsts[s] + n
            if n % chunk == 0 and kept.shape[0] > 0:
                copy(kept[rows[s] + n // chunk, head], state)
            if forgets[t]:
                state[:] = 0
            o, gate = out[t, head], f[t, head]
            o[:] = 0
            for i in range(keys):
                _candidate(row, i, t, head, k, v, state, w)
                for j in range(values):
                    z = tanh(row[j])
                    row[j] = z + gate * (state[i, j] - z)
                for j in range(values):
                    state[i, j] = row[j]
                    o[j] += q[t, head, i] * row[j]
        copy(finals[s, head], state)


@compiled
def _backward(
    first, last, firsts, lengths, rows, forgets, chunk, q, k, v, f, w, kept, do, dfinals, clip, grads, dw, dstarts
):
    (heads, values), keys = v.shape[1:], q.shape[2]
    dq, dk, dv, df = grads
    one, nothing = w.dtype.type(1), w.dtype.type(0)
    # of one chunk: the state before every step, and its Z
    before, candidates = np.empty((chunk, keys, values), w.dtype), np.empty((chunk, keys, values), w.dtype)
    adjoint, now, dpre = np.empty((keys, values), w.dtype), np.empty(values, w.dtype), np.empty(values, w.dtype)
    for lane in range(first, last):
        s, head = lane // heads, lane % heads
        copy(adjoint, dfinals[s, head])
        dw[s, head] = 0
        for n in range((lengths[s] - 1) // chunk, -1, -1):
            begin = firsts[s] + n * chunk
            end = min(begin + chunk, firsts[s] + lengths[s])
            for t in range(begin, end):
                state, z = before[t - begin], candidates[t - begin]
                if t == begin:
                    copy(state, kept[rows[s] + n, head])
                else:
                    for i in range(keys):
                        for j in range(values):
                            past = candidates[t - 1 - begin, i, j]
                            state[i, j] = past + f[t - 1, head] * (before[t - 1 - begin, i, j] - past)
                if forgets[t]:
                    state[:] = 0
                for i in range(keys):
                    _candidate(z[i], i, t, head, k, v, state, w)
                    for j in range(values):
                        z[i, j] = tanh(z[i, j])
            for t in range(end - 1, begin - 1, -1):
                gate, of_gate = f[t, head], nothing
                dv[t, head] = 0
                for i in range(keys):
                    state, z = before[t - begin, i], candidates[t - begin, i]
                    of_query = of_key = nothing
                    for j in range(values):
                        now[j] = adjoint[i, j] + q[t, head, i] * do[t, head, j]
                        if clip > 0:
                            now[j] = min(max(now[j], -clip), clip)
                        dpre[j] = now[j] * (one - gate) * (one - z[j] * z[j])
                    for j in range(values):
                        of_query += (z[j] + gate * (state[j] - z[j])) * do[t, head, j]
                        of_key += dpre[j] * v[t, head, j]
                        of_gate += now[j] * (state[j] - z[j])
                        dv[t, head, j] += k[t, head, i] * dpre[j]
                    dq[t, head, i], dk[t, head, i] = of_query, of_key
                    for m in range(values):
                        for j in range(values):
                            dw[s, head, m, j] += state[m] * dpre[j]
                    for j in range(values):
                        now[j] *= gate
                    along(now, dpre, w[head])
                    for j in range(values):
                        adjoint[i, j] = nothing if forgets[t] else now[j]
                df[t, head] = of_gate
        copy(dstarts[s, head], adjoint)


class _Call:
    """What both passes of one call read, as arrays in the order of the loops' arguments."""

    def __init__(self, tokens: list[Tensor], w: Tensor, reset: Tensor | None, cu_seqlens: Tensor | None, chunk: int):
        batch, length, heads = tokens[0].shape[:3]
        self.dtype, self.tokens = state_dtype(tokens[2].dtype), batch * length
        firsts, lengths, forgets = places(batch, length, reset, cu_seqlens)
        pieces = (lengths + chunk - 1) // chunk
        self.sequences = len(lengths)
        self.lanes, self.work = self.sequences * heads, tokens[1].numel() * tokens[2].shape[3] ** 2
        where = (firsts, lengths, pieces.cumsum(0) - pieces, forgets)
        numbers = [*(x.flatten(0, 1) for x in tokens), w]
        self.arguments = (*map(array, where), chunk, *(array(x.to(self.dtype)) for x in numbers))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w_HVV: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, T, H, V], the last state [S, H, K, V], and the kept states (empty unless `save`)."""
    batch, length, heads, keys = q.shape
    call = _Call([q, k, v, f], w_HVV, reset, cu_seqlens, chunk)
    shape = (heads, keys, v.shape[3])
    start = torch.zeros(call.sequences, *shape, dtype=call.dtype) if s0 is None else s0.to(call.dtype)
    out, final = call.new(*v.shape), call.new(call.sequences, *shape)
    kept = call.new(num_chunks(batch, length, chunk, cu_seqlens) if save else 0, *shape).zero_()
    spread(_forward, call.lanes, call.work, *call.arguments, *map(array, (start, out.flatten(0, 1), final, kept)))
    return out, final, kept


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w_HVV: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, f, w and of the initial states [S, H, K, V]; `clip` bounds the state's, 0 does not."""
    call = _Call([q, k, v, f], w_HVV, reset, cu_seqlens, chunk)
    grads = [call.new(call.tokens, *x.shape[2:]) for x in (q, k, v, f)]
    dw, dstart = call.new(call.sequences, *w_HVV.shape), call.new(*dfinal.shape)
    given = map(array, (kept, do.to(call.dtype).flatten(0, 1), dfinal.to(call.dtype)))
    # in the width of the others
    bound = array(kept.new_tensor(clip))[()]
    arguments = (*call.arguments, *given, bound, tuple(map(array, grads)), array(dw), array(dstart))
    spread(_backward, call.lanes, call.work, *arguments)
    dq, dk, dv, df = (grad.view(x.shape).to(x.dtype) for grad, x in zip(grads, (q, k, v, f), strict=True))
    return dq, dk, dv, df, dw.sum(0).to(w_HVV.dtype), dstart
