"""Equal shares: every class seen so far owns capacity // classes slots, filled by reservoir sampling within it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl.buffers._grouped import Grouped
from cl.core import Batch


class ClassBalanced(Grouped):
    """Groups of rows with equal shares; a new group takes its slots from the largest ones, at random.

    Removal at random keeps what is left of a group a uniform sample of it, so no row's chance depends on when the
    shares shrank. With more groups than slots the latest groups hold one row each. Source: the adaptive variant of
    Avalanche's `ClassBalancedBuffer`, made online.
    """

    def slots(self, batch: Batch, generator: torch.Generator) -> Sequence[tuple[int, int]]:
        # all groups of a batch share from its first row on
        for group in self.groups(batch):
            self.members.setdefault(group, [])
        return super().slots(batch, generator)

    def slot(self, group: int, members: list[int], uniform: float) -> int | None:
        if len(members) < max(1, self.capacity // len(self.members)):
            return self._new_slot(members, uniform)
        return self._replaced(members, int(uniform * self.group_seen[group]))

    def _replaced(self, members: list[int], place: int) -> int | None:
        """Slot that a new row takes within its full group; `place` is uniform over the rows that the group has seen."""
        return members[place] if place < len(members) else None
