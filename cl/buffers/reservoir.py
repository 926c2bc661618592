"""Reservoir sampling: every row seen so far is in the buffer with equal probability (Vitter, 1985, algorithm R)."""

from __future__ import annotations

import torch

from cl.buffers.base import Buffer
from cl.core import Batch


class Reservoir(Buffer):
    """The n-th row fills slot n while there is room, then replaces a uniform slot with probability capacity / n."""

    def slots(self, batch: Batch, generator: torch.Generator) -> list[tuple[int, int]]:
        uniforms = torch.rand(len(batch), generator=generator, dtype=torch.float64).tolist()
        pairs = []
        for row, uniform in enumerate(uniforms):
            slot = self.seen if self.seen < self.capacity else int(uniform * (self.seen + 1))
            if slot < self.capacity:
                pairs.append((slot, row))
            self.seen += 1
        return pairs
