"""Softmax attention in pieces: squares of scores merged into running sums, and the gradients of such a square.

Queries carry the scale. Positions count from the first key kept. Legend: Z = batch * heads; Q queries and N keys of a
square, K/V widths.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# most queries of a square at a time: its scores are the largest temporary of the op
BAND = 128


def squares(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Where a square is due and how wide it is: at token t, keys t - w .. t for queries t .. t + w.

    With w the largest power of two of chunks that divides t, every pair of a key and a later query of another chunk is
    in exactly one square, and all keys of a square are known when it is due.

    Example:
        >>> list(squares(9, 2))
        [(2, 2), (4, 4), (6, 2), (8, 8)]
    """
    for t in range(chunk, length, chunk):
        number = t // chunk
        yield t, (number & -number) * chunk


class Scores:
    """How a query meets a key: q k^T, less the slope of its head per position between them, nothing before `first`."""

    def __init__(self, heads: int, slopes_Z: Tensor | None, first_BT: Tensor | None, kept: int):
        # first: position from which a query may look, [B, T or 1]; kept: the position of the first query
        self.heads, self.slopes, self.first, self.kept = heads, slopes_Z, first_BT, kept

    def __call__(self, q_ZQK: Tensor, k_ZNK: Tensor, query: int, key: int) -> Tensor:
        """Scores [Z, Q, N] of queries from token `query` on and keys from position `key` on."""
        s = torch.bmm(q_ZQK, k_ZNK.mT)
        number, keys = s.shape[1:]
        at = torch.arange(key, key + keys, device=s.device)
        if self.slopes is not None:
            place = torch.arange(self.kept + query, self.kept + query + number, device=s.device)
            s -= self.slopes[:, None, None] * (place[:, None] - at)
        if self.first is not None:
            own = self.first if self.first.shape[1] == 1 else self.first[:, query : query + number]
            hidden = (at < own[..., None])[:, None]
            s.view(-1, self.heads, number, keys).masked_fill_(hidden, -torch.inf)
        return s


class Sums:
    """Running softmax sums of all queries: largest score, sum of weights, weighted values; never empty."""

    def __init__(self, score_ZT1: Tensor, own_v_ZTV: Tensor):
        self.top, self.total, self.values = score_ZT1.clone(), torch.ones_like(score_ZT1), own_v_ZTV.clone()

    def with_keys(self, s_ZQN: Tensor, v_ZNV: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of queries begin .. end after these keys too; overwrites the scores."""
        before = self.top[:, begin:end]
        top = torch.maximum(before, s_ZQN.amax(-1, keepdim=True))
        weight, shrink = s_ZQN.sub_(top).exp_(), (before - top).exp_()
        total = self.total[:, begin:end] * shrink + weight.sum(-1, keepdim=True)
        return top, total, torch.baddbmm(self.values[:, begin:end] * shrink, weight, v_ZNV)

    def add(self, scores: Scores, q_ZTK: Tensor, k_ZNK: Tensor, v_ZNV: Tensor, begin: int, end: int, key: int) -> None:
        """Merge a square of keys into queries begin .. end."""
        for at in range(begin, end, BAND):
            to = min(at + BAND, end)
            found = self.with_keys(scores(q_ZTK[:, at:to], k_ZNK, at, key), v_ZNV, at, to)
            self.top[:, at:to], self.total[:, at:to], self.values[:, at:to] = found


def add_gradients(
    scores: Scores,
    query: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    begin: int,
    end: int,
    key: int,
) -> None:
    """Add the gradients of a square, in place.

    Args:
        query: q, log of the sum of weights, gradient of the attention, and its product with the attention, all queries.
        kv: keys and values of the square.
        grads: of all queries, of the keys and of the values of the square.
    """
    q, log_sum, da, along = query
    (k, v), (dq, dk, dv) = kv, grads
    for at in range(begin, end, BAND):
        now = slice(at, min(at + BAND, end))
        p = scores(q[:, now], k, at, key).sub_(log_sum[:, now]).exp_()
        dv.baddbmm_(p.mT, da[:, now])
        ds = torch.bmm(da[:, now], v.mT).sub_(along[:, now]).mul_(p)
        dk.baddbmm_(ds.mT, q[:, now])
        dq[:, now].baddbmm_(ds, k)
