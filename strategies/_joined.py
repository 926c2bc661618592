"""One data set made of those of several experiences, each row keeping its experience, task and number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl.core import Batch, Data, Experience, TensorData


class Joined:
    """Rows of several data sets, in order."""

    def __init__(self, pieces: Sequence[Data]) -> None:
        self.ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        # one gather per batch in place of one per experience, unless that would copy what the pieces share
        plain = [piece for piece in pieces if type(piece) is TensorData and piece.view is None]
        self.pieces: list[Data] = [TensorData.concat(plain)] if len(plain) == len(pieces) else list(pieces)
        self.tokens_per_row = getattr(pieces[0], "tokens_per_row", 1)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, index: Tensor) -> Batch:
        owner = torch.searchsorted(self.ends, index, right=True)
        local = index - (self.ends[owner] - self._sizes()[owner])
        if len(self.pieces) == 1:
            batch = self.pieces[0].rows(index)
            batch.sample_ids = local
            return batch
        order = owner.argsort(stable=True)
        parts = [piece.rows(local[owner == k]) for k, piece in enumerate(self.pieces) if (owner == k).any()]
        return Batch.cat(parts)[order.argsort()]

    def _sizes(self) -> Tensor:
        return self.ends.diff(prepend=torch.zeros(1, dtype=torch.int64))


def load_joined(experiences: Sequence[Experience]) -> Data:
    """The training rows of all these experiences; a single one is loaded as it is."""
    if len(experiences) == 1:
        return experiences[0].load()
    return Joined([experience.load() for experience in experiences])


def joined_domains(seen: Sequence[Experience], every: Sequence[Experience]) -> tuple[str, ...]:
    """Domains that rows of these experiences come from; none where no domain of the stream comes back.

    Nobody asks there how long ago a domain was practised.
    """
    if not any(each.practises for each in every) and len({each.domain for each in every}) == len(every):
        return ()
    return tuple(dict.fromkeys(name for each in seen for name in each.practises or (each.domain,)))


def joined_classes(experiences: Sequence[Experience]) -> tuple[int, ...]:
    """Classes that occur, in order of appearance."""
    return tuple(dict.fromkeys(c for experience in experiences for c in experience.classes))
