"""The M2RNN on any device: states kept every C steps, the steps between computed again in the backward.

A matrix per token would be K * V numbers kept for K + V read. Inside a chunk only the state is sequential: outputs and
all token gradients are products over the chunk's states at once.

Legend: S sequences (sorted as in `Order`), H heads, K key and V value width, C chunk; states [H, S, K, V].
"""

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.varlen import num_chunks
from kernels.sequential_rnn.order import Order

_tanh_backward = torch.ops.aten.tanh_backward


class _Call:
    """The tokens of one call as rows, and one chunk of them at a time."""

    def __init__(self, tokens: list[Tensor], w_HVV: Tensor, order: Order, chunk: int, dtype: torch.dtype):
        self.tokens, self.order, self.chunk, self.dtype = tokens, order, chunk, dtype
        self.w = w_HVV.to(dtype)

    def rows(self, begin: int, end: int) -> list[Tensor]:
        """q, k, v, f of steps begin .. end as [H, r, width]."""
        found = []
        for x in self.tokens:
            rows = self.order.rows(x, begin, end)
            rows = rows[..., None] if rows.dim() == 2 else rows
            found.append(rows.transpose(0, 1).to(self.dtype).contiguous())
        return found

    def at(self, t: int, begin: int) -> slice:
        """Rows of step t within a chunk that starts at step `begin`."""
        first = self.order.begins[t] - self.order.begins[begin]
        return slice(first, first + self.order.counts[t])

    def walk(
        self, k: Tensor, v: Tensor, f: Tensor, state: Tensor, begin: int, end: int, before: Tensor, candidates: Tensor
    ) -> Tensor:
        """Run steps begin .. end, writing the state every row started from and its Z; returns all states after."""
        heads, _, keys, values = state.shape
        for t in range(begin, end):
            at, n = self.at(t, begin), self.order.counts[t]
            now = before[:, at]
            now.copy_(state[:, :n])
            if t in self.order.forgets:
                now.index_fill_(1, self.order.forgets[t], 0)
            outer = k[:, at, :, None] * v[:, at, None]
            z = torch.baddbmm(outer.view(heads, n * keys, values), now.reshape(heads, n * keys, values), self.w)
            z = torch.tanh(z.view(now.shape), out=candidates[:, at])
            new = torch.lerp(z, now, f[:, at, :, None])
            state = new if n == state.shape[1] else torch.cat([new, state[:, n:]], dim=1)
        return state


def _chunk_rows(order: Order, chunk: int) -> list[int]:
    """First kept row of every chunk of steps, one row per active sequence."""
    rows = [0]
    for t in range(0, order.steps, chunk):
        rows.append(rows[-1] + order.counts[t])
    return rows


def _start(s0: Tensor | None, order: Order, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if s0 is None:
        return like.new_zeros(shape[0], len(order.sequences), *shape[1:])
    return order.sort(s0.to(like.dtype)).transpose(0, 1).contiguous()


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
    dtype = state_dtype(v.dtype)
    batch, length, heads, keys = q.shape
    shape = (heads, keys, v.shape[3])
    order = Order(batch, length, reset, cu_seqlens)
    call = _Call([q, k, v, f], w_HVV, order, chunk, dtype)
    out = torch.empty(v.shape, dtype=dtype, device=v.device)
    rows = num_chunks(batch, length, chunk, cu_seqlens) if save else 0
    kept = out.new_zeros(rows, *shape) if cu_seqlens is not None else out.new_empty(rows, *shape)
    places, kept_HRKV = _chunk_rows(order, chunk), kept.view(heads, -1, keys, v.shape[3])
    state = _start(s0, order, out, shape)
    most = min(chunk, order.steps) * order.counts[0]
    before, candidates = out.new_empty(heads, most, keys, v.shape[3]), out.new_empty(heads, most, keys, v.shape[3])
    for i, begin in enumerate(range(0, order.steps, chunk)):
        end = min(begin + chunk, order.steps)
        if save:
            kept_HRKV[:, places[i] : places[i + 1]] = state[:, : order.counts[begin]]
        qr, kr, vr, fr = call.rows(begin, end)
        r = qr.shape[1]
        state = call.walk(kr, vr, fr, state, begin, end, before[:, :r], candidates[:, :r])
        after = torch.lerp(candidates[:, :r], before[:, :r], fr[..., None])
        o = (qr.flatten(0, 1)[:, None] @ after.flatten(0, 1))[:, 0]
        order.put(out, o.view(heads, r, -1).transpose(0, 1), begin, end)
    return out, order.unsort(state.transpose(0, 1).contiguous()), kept


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
    dtype = kept.dtype
    batch, length, heads, keys = q.shape
    values = v.shape[3]
    order = Order(batch, length, reset, cu_seqlens)
    call = _Call([q, k, v, f], w_HVV, order, chunk, dtype)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, f)]
    places, kept_HRKV = _chunk_rows(order, chunk), kept.view(heads, -1, keys, values)
    adjoint = order.sort(dfinal.to(dtype)).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    dw, w_back = torch.zeros_like(call.w), call.w.mT.contiguous()
    most = min(chunk, order.steps) * order.counts[0]
    scratch = [kept.new_empty(heads, most, keys, values) for _ in range(4)]
    for begin in range((order.steps - 1) // chunk * chunk, -1, -chunk):
        end, i = min(begin + chunk, order.steps), begin // chunk
        qr, kr, vr, fr = call.rows(begin, end)
        r = qr.shape[1]
        dor = order.rows(do, begin, end).transpose(0, 1).to(dtype)
        before, z, ds, dp = (x[:, :r] for x in scratch)
        call.walk(kr, vr, fr, kept_HRKV[:, places[i] : places[i + 1]], begin, end, before, z)
        torch.mul(qr[..., None], dor[..., None, :], out=ds)
        open_gate = _tanh_backward((1 - fr)[..., None], z)
        for t in range(end - 1, begin - 1, -1):
            at, n = call.at(t, begin), order.counts[t]
            now = ds[:, at]
            now += adjoint[:, :n]
            if clip:
                now.clamp_(-clip, clip)
            d = torch.mul(now, open_gate[:, at], out=dp[:, at])
            leaving = (now * fr[:, at, :, None]).view(heads, n * keys, values)
            leaving = leaving.baddbmm_(d.reshape(heads, n * keys, values), w_back).view(now.shape)
            if t in order.forgets:
                leaving.index_fill_(1, order.forgets[t], 0)
            adjoint[:, :n] = leaving
        after = torch.lerp(z, before, fr[..., None])
        dw.baddbmm_(before.flatten(1, 2).mT, dp.flatten(1, 2))
        grads = [
            (after @ dor[..., None])[..., 0],
            (dp @ vr[..., None])[..., 0],
            (kr[..., None, :] @ dp)[..., 0, :],
            (ds * (before - z)).sum((2, 3)),
        ]
        for out, grad in zip(outs, grads, strict=True):
            order.put(out, grad.transpose(0, 1), begin, end)
    dq, dk, dv, df = outs
    return dq, dk, dv, df, dw.to(w_HVV.dtype), order.unsort(adjoint.transpose(0, 1).contiguous())
