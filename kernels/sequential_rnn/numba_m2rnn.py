"""The M2RNN on a CPU as compiled loops: each head of a sequence walks through its tokens alone.

A state is held as [V, K], so that the inner loops run over keys. States are kept every C steps, and the steps between
computed again in the backward.

Legend: S sequences, R tokens, H heads, K key and V value width, C chunk; tokens [R, H, K or V], states [H, V, K], the
transition as [H, column, row], and as it is for the way back.
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
def _candidates(z, t, head, k, v, state, w):
    """Z = S W + k v^T before its tanh, column by column."""
    for j in range(z.shape[0]):
        for i in range(z.shape[1]):
            z[j, i] = k[t, head, i] * v[t, head, j]
        onto(z[j], w[head, j], state)


@compiled
def _forward(first, last, firsts, lengths, rows, forgets, chunk, q, k, v, f, w, starts, out, finals, kept):
    (heads, values), keys = v.shape[1:], q.shape[2]
    state, z = np.empty((values, keys), w.dtype), np.empty((values, keys), w.dtype)
    for lane in range(first, last):
        s, head = lane // heads, lane % heads
        copy(state, starts[s, head])
        for n in range(lengths[s]):
            t = firsts[s] + n
            if n % chunk == 0 and kept.shape[0] > 0:
                copy(kept[rows[s] + n // chunk, head], state)
            if forgets[t]:
                state[:] = 0
            _candidates(z, t, head, k, v, state, w)
            gate = f[t, head]
            for j in range(values):
                read = gate - gate
                for i in range(keys):
                    new = tanh(z[j, i])
                    new += gate * (state[j, i] - new)
                    state[j, i] = new
                    read += q[t, head, i] * new
                out[t, head, j] = read
        copy(finals[s, head], state)


@compiled
def _backward(
    first,
    last,
    firsts,
    lengths,
    rows,
    forgets,
    chunk,
    q,
    k,
    v,
    f,
    w,
    kept,
    w_back,
    do,
    dfinals,
    clip,
    grads,
    dw,
    dstarts,
):
    (heads, values), keys = v.shape[1:], q.shape[2]
    dq, dk, dv, df = grads
    one, zero = w.dtype.type(1), w.dtype.type(0)
    # of one chunk: the state before every step, and its Z
    before, candidates = np.empty((chunk, values, keys), w.dtype), np.empty((chunk, values, keys), w.dtype)
    adjoint, dpre = np.empty((values, keys), w.dtype), np.empty((values, keys), w.dtype)
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
                    was, past, gate = before[t - 1 - begin], candidates[t - 1 - begin], f[t - 1, head]
                    for j in range(values):
                        for i in range(keys):
                            state[j, i] = past[j, i] + gate * (was[j, i] - past[j, i])
                if forgets[t]:
                    state[:] = 0
                _candidates(z, t, head, k, v, state, w)
                for j in range(values):
                    for i in range(keys):
                        z[j, i] = tanh(z[j, i])
            for t in range(end - 1, begin - 1, -1):
                state, z = before[t - begin], candidates[t - begin]
                gate, of_gate = f[t, head], zero
                dq[t, head] = 0
                dk[t, head] = 0
                for j in range(values):
                    of_read, of_value = do[t, head, j], zero
                    for i in range(keys):
                        now = adjoint[j, i] + q[t, head, i] * of_read
                        now = min(max(now, -clip), clip) if clip > 0 else now
                        adjoint[j, i] = now
                        dpre[j, i] = now * (one - gate) * (one - z[j, i] * z[j, i])
                    for i in range(keys):
                        of_value += k[t, head, i] * dpre[j, i]
                        of_gate += adjoint[j, i] * (state[j, i] - z[j, i])
                    for i in range(keys):
                        dq[t, head, i] += of_read * (z[j, i] + gate * (state[j, i] - z[j, i]))
                        dk[t, head, i] += v[t, head, j] * dpre[j, i]
                    dv[t, head, j] = of_value
                df[t, head] = of_gate
                for m in range(values):
                    along(dw[s, head, m], state[m], dpre)
                    for i in range(keys):
                        adjoint[m, i] *= gate
                    onto(adjoint[m], w_back[head, m], dpre)
                if forgets[t]:
                    adjoint[:] = 0
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
        numbers = [*(x.flatten(0, 1) for x in tokens), w.mT]
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
    call, shape = _Call([q, k, v, f], w_HVV, reset, cu_seqlens, chunk), (heads, v.shape[3], keys)
    start = torch.zeros(call.sequences, *shape, dtype=call.dtype) if s0 is None else s0.mT.to(call.dtype)
    out, final = call.new(*v.shape), call.new(call.sequences, *shape)
    kept = call.new(num_chunks(batch, length, chunk, cu_seqlens) if save else 0, *shape).zero_()
    spread(_forward, call.lanes, call.work, *call.arguments, *map(array, (start, out.flatten(0, 1), final, kept)))
    return out, final.mT.contiguous(), kept.view(-1, heads, keys, v.shape[3])


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
    dw, dstart = call.new(call.sequences, *w_HVV.shape), call.new(*dfinal.mT.shape)
    numbers = (w_HVV, do.flatten(0, 1), dfinal.mT)
    given = [array(each.to(call.dtype)) for each in (kept.view(-1, *dstart.shape[1:]), *numbers)]
    # in the width of the others
    bound = array(kept.new_tensor(clip))[()]
    arguments = (*call.arguments, *given, bound, tuple(map(array, grads)), array(dw), array(dstart))
    spread(_backward, call.lanes, call.work, *arguments)
    dq, dk, dv, df = (grad.view(x.shape).to(x.dtype) for grad, x in zip(grads, (q, k, v, f), strict=True))
    return dq, dk, dv, df, dw.sum(0).to(w_HVV.dtype), dstart.mT.contiguous()
