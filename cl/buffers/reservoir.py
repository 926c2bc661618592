"""Reservoir sampling: every row seen so far is in the buffer with equal probability (Vitter, 1985, algorithm R)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl.buffers.base import Buffer
from cl.core import Batch


class Reservoir(Buffer):
    """The n-th row fills slot n while there is room, then replaces a uniform slot with probability capacity / n."""

    def slots(self, batch: Batch, generator: torch.Generator) -> Sequence[tuple[int, int]]:
        uniforms = torch.rand(len(batch), generator=generator, dtype=torch.float64).tolist()
        seen, capacity = self.seen, self.capacity
        num_free = min(max(capacity - seen, 0), len(batch))
        pairs = [(seen + row, row) for row in range(num_free)]
        for row in range(num_free, len(batch)):
            slot = int(uniforms[row] * (seen + row + 1))
            if slot < capacity:
                pairs.append((slot, row))
        self.seen += len(batch)
        self.filled = min(self.seen, capacity)
        return pairs
