"""Packed rows: windows of a corpus, documents one after another, each token learnt once in a pass.

Row i of T tokens reads tokens [iT, iT + T) of its shard and predicts tokens [iT + 1, iT + T + 1). Which tokens belong
together is in the rows themselves: a document begins where the separator is read (`StreamInfo.separator`). So rows that
a strategy stores and replays carry their boundaries with them, and nothing beside the ids has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cl.core import Batch, UserError
from streams._shards import Corpus
from streams._tokenizers import Tokenizer


def num_windows(corpus: Corpus, context: int) -> int:
    """Rows of one pass over a corpus; fewer than T tokens at the end of each shard are left out."""
    return sum((count - 1) // context for _, count in corpus.shards)


class Packed:
    """Rows of a corpus, pass after pass.

    Args:
        context: T, tokens of a row.
        num_rows: more than one pass where that is more than there are; None takes one.
        experience_id: where the domain was first seen.
        spread_over: fewer rows than these first ones of the text come from all over them; None takes the very first.
        shift: other rows, as far apart, for another number.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        num_rows: int | None = None,
        experience_id: int = 0,
        spread_over: int | None = None,
        shift: int = 0,
    ) -> None:
        self.context, self.experience_id, self.spread_over, self.shift = context, experience_id, spread_over, shift
        self.shards = [corpus.tokens(number) for number in range(len(corpus.shards))]
        self.ends = np.cumsum([(len(tokens) - 1) // context for tokens in self.shards])
        self.num_rows = int(self.ends[-1]) if num_rows is None else num_rows
        # torch has few operations for unsigned integers
        self.dtype = np.int16 if corpus.vocabulary <= 1 << 15 else np.int32

    def __len__(self) -> int:
        return self.num_rows

    def rows(self, index: Tensor) -> Batch:
        windows = self._windows(index.numpy())
        tokens = np.empty((len(windows), self.context + 1), np.int64)
        owner = np.searchsorted(self.ends, windows, side="right")
        for number in np.unique(owner).tolist():
            chosen = owner == number
            first = int(self.ends[number - 1]) if number else 0
            starts = (windows[chosen] - first) * self.context
            tokens[chosen] = self.shards[number][starts[:, None] + np.arange(self.context + 1)]
        ids = torch.from_numpy(tokens)
        return Batch(
            torch.from_numpy(tokens[:, :-1].astype(self.dtype)),
            ids[:, 1:].contiguous(),
            torch.full((len(index),), self.experience_id),
            index,
        )

    def _windows(self, index: np.ndarray) -> np.ndarray:
        count = self.spread_over or int(self.ends[-1])
        if self.spread_over is None or self.num_rows > count:
            return index % count
        return (index * count // self.num_rows + self.shift) % count


def as_ids(raw: Tensor) -> Tensor:
    """Stored ids as embeddings take them."""
    return raw.long()


def text_bytes(rows: Packed, corpus: Corpus, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes behind all targets of `rows`; in proportion to the tokens where a token does not say its bytes."""
    if tokenizer.token_bytes is None:
        return round(corpus.num_bytes * len(rows) * rows.context / corpus.num_tokens)
    every = torch.arange(len(rows)).split(4096)
    return sum(int(tokenizer.token_bytes[rows.rows(some).targets.numpy()].sum()) for some in every)


def pass_by_pass(num_windows: int) -> partial[Tensor]:
    """An `Order`: every window once in random order, then every window again, for as many rows as there are."""
    return partial(_in_passes, num_windows=num_windows)


def _in_passes(num_rows: int, epoch: int, generator: torch.Generator, num_windows: int) -> Tensor:
    parts = [
        low + torch.randperm(min(num_windows, num_rows - low), generator=generator)
        for low in range(0, num_rows, num_windows)
    ]
    return torch.cat(parts)


class Mixed:
    """Rows of several data sets, in order; each keeps the experience it was first seen in.

    Args:
        parts: the data sets; their rows are numbered through.
    """

    def __init__(self, parts: Sequence[Packed]) -> None:
        self.parts = list(parts)
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, index: Tensor) -> Batch:
        owner = torch.searchsorted(self.ends, index, right=True)
        order = owner.argsort(stable=True)
        batches = []
        for number in owner.unique().tolist():
            first = int(self.ends[number - 1]) if number else 0
            batches.append(self.parts[number].rows(index[owner == number] - first))
        batch = Batch.cat(batches)[order.argsort()]
        batch.sample_ids = index
        return batch


def require_windows(name: str, corpus: Corpus, context: int) -> int:
    """Rows of a pass.

    Raises:
        UserError: the text is shorter than one row.
    """
    count = num_windows(corpus, context)
    if count == 0:
        raise UserError(
            f"domain {name!r} has {corpus.num_tokens} tokens, fewer than a row of stream.context={context} needs; give "
            "it more text or a shorter context"
        )
    return count
