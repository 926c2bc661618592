"""Tokens in the order of their steps: all sequences advance together, the longest first, so that the active ones are a
prefix of the rows at every step. Dense and packed batches are the same thing here.

Legend: S sequences, R tokens in all, H heads; rows of one step are contiguous, in the order of the sorted sequences.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from itertools import pairwise

import torch
from torch import Tensor


class Order:
    """The steps of one call: step t owns rows begins[t] .. begins[t + 1], one per sequence still running."""

    def __init__(self, batch: int, length: int, reset: Tensor | None, cu_seqlens: Tensor | None):
        if cu_seqlens is None:
            lengths, firsts = [length] * batch, [b * length for b in range(batch)]
        else:
            offsets = cu_seqlens.tolist()
            lengths, firsts = [e - b for b, e in pairwise(offsets)], offsets[:-1]
        self.sequences = sorted(range(len(lengths)), key=lambda s: -lengths[s])
        self.is_dense = cu_seqlens is None
        self.steps = max(lengths)
        ends = sorted(lengths, reverse=True)
        self.counts: list[int] = []
        active = len(ends)
        for t in range(self.steps):
            while ends[active - 1] <= t:
                active -= 1
            self.counts.append(active)
        self.begins = [0]
        for count in self.counts:
            self.begins.append(self.begins[-1] + count)
        self.batch = batch
        # packed token of every row
        self.token: Tensor | None = None
        if not self.is_dense:
            order = [firsts[s] + t for t in range(self.steps) for s in self.sequences[: self.counts[t]]]
            self.token = torch.tensor(order, dtype=torch.long)
        self.forgets = self._forgets(reset, batch * length)

    def _forgets(self, reset: Tensor | None, tokens: int) -> dict[int, Tensor]:
        """Sequences (by sorted position) whose state is dropped before a step."""
        if reset is None or not bool(reset.any()):
            return {}
        flat = reset.bool().cpu()
        rows = flat.transpose(0, 1).flatten() if self.token is None else flat.flatten()[self.token]
        found: dict[int, Tensor] = {}
        for t in range(self.steps):
            hit = rows[self.begins[t] : self.begins[t + 1]].nonzero().flatten()
            if len(hit):
                found[t] = hit.to(reset.device)
        return found

    def rows(self, x_BTX: Tensor, begin: int, end: int) -> Tensor:
        """Tokens of steps begin .. end as rows [r, X]."""
        if self.token is None:
            return x_BTX[:, begin:end].transpose(0, 1).flatten(0, 1)
        index = self.token[self.begins[begin] : self.begins[end]].to(x_BTX.device)
        return x_BTX[0].index_select(0, index)

    def put(self, out_BTX: Tensor, rows_RX: Tensor, begin: int, end: int) -> None:
        """Write the rows of steps begin .. end to their tokens."""
        if self.token is None:
            out_BTX[:, begin:end] = rows_RX.unflatten(0, (end - begin, self.batch)).transpose(0, 1)
        else:
            out_BTX[0, self.token[self.begins[begin] : self.begins[end]].to(out_BTX.device)] = rows_RX.to(out_BTX.dtype)

    def sort(self, x_SX: Tensor) -> Tensor:
        """States of all sequences in the sorted order."""
        return x_SX if self.is_dense else x_SX[self.sequences]

    def unsort(self, x_SX: Tensor) -> Tensor:
        """Inverse of `sort`."""
        if self.is_dense:
            return x_SX
        out = torch.empty_like(x_SX)
        out[self.sequences] = x_SX
        return out

    def before(self, states_HRX: Tensor, start_HSX: Tensor, begin: int, end: int) -> Tensor:
        """The state every row of steps begin .. end started from, [H, r, X]; `start` is the one before step `begin`."""
        pieces = [start_HSX[:, : self.counts[begin]]]
        if self.is_dense:
            pieces.append(states_HRX[:, self.begins[begin] : self.begins[end - 1]])
        else:
            for t in range(begin, end - 1):
                at = self.begins[t]
                pieces.append(states_HRX[:, at : at + self.counts[t + 1]])
        out = torch.cat(pieces, dim=1)
        for t, hit in self.forgets.items():
            if begin <= t < end:
                out[:, self.begins[t] - self.begins[begin] + hit] = 0
        return out
