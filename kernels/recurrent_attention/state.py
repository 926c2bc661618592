"""What a call of recurrent attention leaves behind, and packed sequences laid side by side.

Legend: S sequences, N positions kept, T time, L tokens of the longest sequence, H heads, K/V key/value width, X sizes.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class RecurrentAttentionState(NamedTuple):
    """Keys [S, N, H, K] and values [S, N, H, V] of the positions so far, the latest last, float32.

    `first` int64 [S]: position from which on a sequence looks back; what stands before it was forgotten by a reset, or
    fills up the row of a sequence that is shorter than others. Positions before the smallest `first` may be cut off.
    """

    keys: Tensor
    values: Tensor
    first: Tensor


def looks_back_to(state: RecurrentAttentionState | None, reset_ST: Tensor | None) -> Tensor | None:
    """First position that each token may look at, int64 [S, T or 1]; None where it may look at all."""
    if reset_ST is None:
        return None if state is None else state.first[:, None]
    kept = 0 if state is None else state.keys.shape[1]
    place = torch.arange(kept, kept + reset_ST.shape[1], device=reset_ST.device)
    begins = (reset_ST.bool() * place).cummax(dim=1).values
    return begins if state is None else torch.maximum(begins, state.first[:, None])


def side_by_side(x_1TX: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed rows as [S, L, X], zeros behind the shorter sequences."""
    offsets = cu_seqlens.tolist()
    rows = [x_1TX[0, begin:end] for begin, end in pairwise(offsets)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def packed(x_SLX: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Inverse of `side_by_side`."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([row[:length] for row, length in zip(x_SLX, lengths, strict=True)])[None]


def latest_last(state: RecurrentAttentionState, cu_seqlens: Tensor) -> RecurrentAttentionState:
    """The state after sequences of different length: what fills up a row moves from its end to its front."""
    lengths = cu_seqlens.long().diff()
    missing = lengths.max() - lengths

    def move(x_SNX: Tensor) -> Tensor:
        rows = [row[: len(row) - m] for row, m in zip(x_SNX, missing.tolist(), strict=True)]
        return torch.stack([torch.cat([row.new_zeros(len(x_SNX[0]) - len(row), *row.shape[1:]), row]) for row in rows])

    first = state.first + missing.to(state.first.device)
    return RecurrentAttentionState(move(state.keys), move(state.values), first)
