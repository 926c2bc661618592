"""Equal shares: every class seen so far owns capacity // classes slots, filled by reservoir sampling within the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cl.buffers.base import Buffer
from cl.core import Batch


class ClassBalanced(Buffer):
    """Groups of rows with equal shares; a new group takes its slots from the largest ones, at random.

    Removal at random keeps what is left of a group a uniform sample of it, so no row's chance depends on when the
    shares shrank. Source: the adaptive variant of Avalanche's `ClassBalancedBuffer`, made online.
    """

    group_by = "targets"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.members: dict[int, list[int]] = {}
        self.group_seen: dict[int, int] = {}

    def slots(self, batch: Batch, generator: torch.Generator) -> list[tuple[int, int]]:
        groups = getattr(batch, self.group_by).tolist()
        uniforms = torch.rand(len(batch), 2, generator=generator, dtype=torch.float64).tolist()
        pairs = []
        for row, (group, (first, second)) in enumerate(zip(groups, uniforms, strict=True)):
            slot = self._slot(group, first, second)
            if slot is not None:
                pairs.append((slot, row))
            self.seen += 1
        return pairs

    def _slot(self, group: int, first: float, second: float) -> int | None:
        members = self.members.setdefault(group, [])
        self.group_seen[group] = self.group_seen.get(group, 0) + 1
        if len(members) < max(1, self.capacity // len(self.members)):
            slot = self._new_slot(first)
            members.append(slot)
            return slot
        return self._replaced(members, self.group_seen[group], second)

    def _new_slot(self, uniform: float) -> int:
        """An unused slot, or one of the largest group's when there is none."""
        used = sum(map(len, self.members.values()))
        if used < self.capacity:
            return used
        largest = max(self.members.values(), key=len)
        return largest.pop(int(uniform * len(largest)))

    def _replaced(self, members: list[int], seen: int, uniform: float) -> int | None:
        """Slot that a new row takes within its full group, None when it is not stored; `seen` counts the row."""
        place = int(uniform * seen)
        return members[place] if place < len(members) else None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"members": self.members, "group_seen": self.group_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.members, self.group_seen = dict(state["members"]), dict(state["group_seen"])
