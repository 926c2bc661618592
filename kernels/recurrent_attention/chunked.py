"""Recurrent attention chunk by chunk: what depends on the output before it runs token by token, nothing else.

Inside a chunk every query reads the chunk's keys directly; keys of earlier chunks come in squares (`tiles.squares`), as
soon as they are known. The backward goes the same way in reverse: when a chunk is entered its keys have all they get
from later chunks; what they get from its own queries is fetched token by token, and products over weights come last.

Legend: B batch, T time, H heads, Z = B * H, K/V key/value width, E = K + V, D model width, N positions kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.recurrent_attention.call import Call, Piece
from kernels.recurrent_attention.tiles import Sums, add_gradients, squares


def forward(
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept_BHNE: Tensor,
    first_BT: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run all tokens x, q, k, v with the weights out, k, v and, with an inner layer, up and down.

    Returns:
        output [B, T, D], keys and values left by the tokens [B, H, T, E], attention [Z, T, V] and the log of its sum of
        weights [Z, T, 1], all in the arithmetic dtype.
    """
    call = Call(tokens, weights, kept_BHNE, first_BT, slopes, scale)
    length, kept = call.length, call.kept.shape[1]
    y, kv = torch.empty_like(call.x), call.q.new_empty(len(call.q), length, call.kept.shape[2])
    a, log_sum = torch.empty_like(call.own_v), torch.empty_like(call.own_score)
    sums = Sums(call.own_score, call.own_v)
    if kept:
        sums.add(call.scores, call.q, *call.split(call.kept), 0, length, 0)
    keys, values = call.split(kv)
    wide = dict(squares(length, chunk))
    for t in range(length):
        begin, now = t // chunk * chunk, slice(t, t + 1)
        if t in wide:
            old = slice(t - wide[t], t)
            sums.add(call.scores, call.q, keys[:, old], values[:, old], t, min(t + wide[t], length), kept + old.start)
        top, total, part = sums.top[:, now], sums.total[:, now], sums.values[:, now]
        if t > begin:
            s = call.scores(call.q[:, now], keys[:, begin:t], t, kept + begin)
            top, total, part = sums.with_keys(s, values[:, begin:t], t, t + 1)
        a[:, now], log_sum[:, now] = part / total, top + total.log()
        y[:, t], kv[:, t] = call.step(call.x[:, t], a[:, t])
    return y, call.by_head(kv), a, log_sum


def backward(
    dy: Tensor,
    dkv: Tensor,
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept_BHNE: Tensor,
    first_BT: Tensor | None,
    slopes: Tensor | None,
    saved: Sequence[Tensor],
    scale: float,
    chunk: int,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of the tokens, of the weights, and of the keys and values kept.

    `saved` is what `forward` returned, and the gradients given are those of its first two parts.
    """
    call = Call(tokens, weights, kept_BHNE, first_BT, slopes, scale)
    y, kv_BHTE, a, log_sum = saved
    kv, kept = kv_BHTE.flatten(0, 1), call.kept.shape[1]
    dy = dy.to(y.dtype).clone()
    dkv = dkv.to(y.dtype).flatten(0, 1).clone()
    dq, dx = torch.zeros_like(call.q), torch.empty_like(y)
    da, along = torch.empty_like(a), torch.empty_like(log_sum)
    dweights = [torch.zeros_like(w) for w in (call.out, call.kv, *call.inner)]
    query, wide = (call.q, log_sum, da, along), dict(squares(call.length, chunk))
    for begin in range((call.length - 1) // chunk * chunk, -1, -chunk):
        now = slice(begin, min(begin + chunk, call.length))
        piece = Piece(call, now, y, kv, a)
        p = call.scores(call.q[:, now], piece.keys, begin, kept + begin).sub_(log_sum[:, now]).exp_().tril_(-1)
        dx[:, now], ds = piece.back(dy[:, now], dkv[:, now], p.mT.contiguous(), da[:, now], along[:, now])
        dq[:, now].baddbmm_(ds.mT, piece.keys)
        for total, found in zip(dweights, piece.weight_gradients(dx[:, now], dy[:, now], dkv[:, now]), strict=True):
            total += found
        if begin in wide:
            old, end = slice(begin - wide[begin], begin), min(begin + wide[begin], call.length)
            grads = (dq, *call.split(dkv[:, old]))
            add_gradients(call.scores, query, call.split(kv[:, old]), grads, begin, end, kept + old.start)
    dkept = torch.zeros_like(call.kept)
    if kept:
        grads = (dq, *call.split(dkept))
        add_gradients(call.scores, query, call.split(call.kept), grads, 0, call.length, 0)
    return _tokens(call, tokens, query, dx, dq, scale), _weights(call, weights, dweights), _like(dkept, kept_BHNE)


def _like(found: Tensor, given: Tensor) -> Tensor:
    """A gradient in the shape and dtype of what it belongs to, sharing memory with nothing."""
    return found.reshape(given.shape).to(given.dtype, memory_format=torch.contiguous_format, copy=True)


def _tokens(
    call: Call, tokens: Sequence[Tensor], query: tuple[Tensor, ...], dx: Tensor, dq: Tensor, scale: float
) -> list[Tensor]:
    """Gradients of x, q, k, v, once every token's own key and value are counted."""
    _, log_sum, da, along = query
    p = (call.own_score - log_sum).exp_()
    ds = ((da * call.own_v).sum(-1, keepdim=True) - along) * p
    dq = dq.addcmul_(ds, call.own_k).mul_(scale)
    found = [dx, *(call.by_head(d).transpose(1, 2) for d in (dq, ds * call.q, p * da))]
    return [_like(d, t) for d, t in zip(found, tokens, strict=True)]


def _weights(call: Call, weights: Sequence[Tensor], dweights: list[Tensor]) -> list[Tensor]:
    """Gradients of the weights in their own shapes."""
    d_out, d_kv, *d_inner = dweights
    found = [d_out, *call.split(d_kv.view(len(d_kv), call.heads, -1)), *d_inner]
    return [_like(d, w) for d, w in zip(found, weights, strict=True)]
