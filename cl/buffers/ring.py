"""Ring buffer: equal shares per class, each holding its newest rows (Lopez-Paz & Ranzato, 2017)."""

from __future__ import annotations

from cl.buffers.class_balanced import ClassBalanced


class Ring(ClassBalanced):
    """As `ClassBalanced`, first in, first out within a class."""

    def _evicted(self, num_members: int, uniform: float) -> int:
        return 0

    def _replaced(self, members: list[int], place: int) -> int | None:
        oldest = members.pop(0)
        members.append(oldest)
        return oldest
