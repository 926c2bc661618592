"""Ring buffer: equal shares per class, each holding its newest rows (Lopez-Paz & Ranzato, 2017)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from cl.buffers._grouped import Members
from cl.buffers.class_balanced import ClassBalanced


class Ring(ClassBalanced):
    """As `ClassBalanced`, first in, first out within a class."""

    @staticmethod
    def holder(slots: Iterable[int]) -> Members:
        return deque(slots)

    def _evicted(self, members: Members, uniform: float) -> int:
        oldest = members[0]
        del members[0]
        return oldest

    def _replaced(self, members: Members, place: int) -> int | None:
        members.append(self._evicted(members, 0.0))
        return members[-1]
