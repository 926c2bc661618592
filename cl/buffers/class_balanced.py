"""Equal shares: every class seen so far owns capacity // classes slots, filled by reservoir sampling within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cl.buffers.base import Buffer
from cl.core import Batch, UserError


class Grouped(Buffer):
    """Rows in groups, each of which knows its slots and how many rows it has seen; `slot` is the policy.

    Classes of different heads are different groups.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.members: dict[int, list[int]] = {}
        self.group_seen: dict[int, int] = {}

    def groups(self, batch: Batch) -> list[int]:
        """The group of each row."""
        if batch.targets.dim() > 1:
            raise UserError(
                f"buffer policy class_balanced needs one class per row, and the targets have shape "
                f"{tuple(batch.targets.shape)}; use reservoir or experience_balanced"
            )
        if batch.task_id is None:
            return batch.targets.tolist()
        return (batch.task_id * (1 << 32) + batch.targets).tolist()

    def slots(self, batch: Batch, generator: torch.Generator) -> Sequence[tuple[int, int]]:
        uniforms = torch.rand(len(batch), generator=generator, dtype=torch.float64).tolist()
        pairs = []
        for row, (group, uniform) in enumerate(zip(self.groups(batch), uniforms, strict=True)):
            members = self.members.setdefault(group, [])
            self.group_seen[group] = self.group_seen.get(group, 0) + 1
            slot = self.slot(group, members, uniform)
            if slot is not None:
                pairs.append((slot, row))
        self.seen += len(batch)
        return pairs

    def slot(self, group: int, members: list[int], uniform: float) -> int | None:
        """Where the next row of a group goes, None for nowhere; a slot that the group gains is added to `members`."""
        raise NotImplementedError

    def _new_slot(self, members: list[int], uniform: float) -> int:
        """The group gains an unused slot, or one of the largest group's when there is none."""
        if self.filled < self.capacity:
            self.filled += 1
            members.append(self.filled - 1)
        else:
            largest = max(self.members.values(), key=len)
            members.append(largest.pop(self._evicted(len(largest), uniform)))
        return members[-1]

    def _evicted(self, num_members: int, uniform: float) -> int:
        """Which member a shrinking group gives up."""
        return int(uniform * num_members)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"members": self.members, "group_seen": self.group_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.members = {group: list(slots) for group, slots in state["members"].items()}
        self.group_seen = dict(state["group_seen"])


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
