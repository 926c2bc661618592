"""Reservoir sampling: every row seen so far is in the buffer with equal probability (Vitter, 1985, algorithm R)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cl.buffers.base import Buffer
from cl.core import Batch


class Reservoir(Buffer):
    """The n-th row fills slot n while there is room, then replaces a uniform slot with probability capacity / n."""

    def slots(self, batch: Batch, generator: torch.Generator) -> Sequence[tuple[int, int]]:
        uniforms = torch.rand(len(batch), generator=generator, dtype=torch.float64).numpy()
        own = np.arange(self.seen, self.seen + len(batch))
        slots = np.where(own < self.capacity, own, (uniforms * (own + 1)).astype(np.int64))
        rows = np.flatnonzero(slots < self.capacity)
        self.seen += len(batch)
        self.filled = min(self.seen, self.capacity)
        return list(zip(slots[rows].tolist(), rows.tolist(), strict=True))
