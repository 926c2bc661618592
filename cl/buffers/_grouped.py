"""What policies that hold rows in groups have in common: members, slots, and how groups grow at each other's cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from typing import Any

import torch

from cl.buffers.base import Buffer
from cl.core import Batch, UserError

Members = MutableSequence[int]


class Grouped(Buffer):
    """Rows in groups, each of which knows its slots and how many rows it has seen; `slot` is the policy.

    Classes of different heads are different groups.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.members: dict[int, Members] = {}
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
        groups = self.groups(batch)
        self._expect(groups)
        pairs = []
        for row, (group, uniform) in enumerate(zip(groups, uniforms, strict=True)):
            if group not in self.members:
                self._open(group)
            self.group_seen[group] += 1
            slot = self.slot(group, self.members[group], uniform)
            if slot is not None:
                pairs.append((slot, row))
        self.seen += len(batch)
        return pairs

    @staticmethod
    def holder(slots: Iterable[int]) -> Members:
        """What the slots of a group are held in."""
        return list(slots)

    def _expect(self, groups: list[int]) -> None:
        """Told the groups of a batch before its first row is placed."""

    def _open(self, group: int) -> None:
        self.members[group], self.group_seen[group] = self.holder([]), 0

    def slot(self, group: int, members: Members, uniform: float) -> int | None:
        """Where the next row of a group goes, None for nowhere; a slot that the group gains is added to `members`."""
        raise NotImplementedError

    def _new_slot(self, members: Members, uniform: float) -> int:
        """The group gains an unused slot, or one of the largest group's when there is none."""
        if self.filled < self.capacity:
            self.filled += 1
            members.append(self.filled - 1)
        else:
            members.append(self._evicted(max(self.members.values(), key=len), uniform))
        return members[-1]

    def _evicted(self, members: Members, uniform: float) -> int:
        """The slot that a shrinking group gives up."""
        return members.pop(int(uniform * len(members)))

    def state_dict(self) -> dict[str, Any]:
        members = {group: list(slots) for group, slots in self.members.items()}
        return super().state_dict() | {"members": members, "group_seen": self.group_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.members = {group: self.holder(slots) for group, slots in state["members"].items()}
        self.group_seen = dict(state["group_seen"])
