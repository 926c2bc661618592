"""First in, first out: the newest rows, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl.buffers.base import Buffer
from cl.core import Batch


class Fifo(Buffer):
    """The n-th row takes slot n modulo capacity."""

    def slots(self, batch: Batch, generator: torch.Generator) -> Sequence[tuple[int, int]]:
        pairs = [((self.seen + row) % self.capacity, row) for row in range(len(batch))]
        self.seen += len(batch)
        self.filled = min(self.seen, self.capacity)
        return pairs
