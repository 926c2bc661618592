"""Equal shares per experience, filled by reservoir sampling within each (Avalanche's `ExperienceBalancedBuffer`)."""

from __future__ import annotations

from cl.buffers.class_balanced import ClassBalanced
from cl.core import Batch


class ExperienceBalanced(ClassBalanced):
    """As `ClassBalanced`, with experiences in place of classes."""

    def groups(self, batch: Batch) -> list[int]:
        return batch.experience_id.tolist()
