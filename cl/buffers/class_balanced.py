"""Equal shares: every class seen so far owns capacity // classes slots, filled by reservoir sampling within it."""

from __future__ import annotations

from cl.buffers._grouped import Grouped, Members


class ClassBalanced(Grouped):
    """Groups of rows with equal shares; a new group takes its slots from the largest ones, at random.

    Removal at random keeps what is left of a group a uniform sample of it, so no row's chance depends on when the
    shares shrank. With more groups than slots a group holds one row or none, and a row of one that holds none takes
    the place of the group seen first among the others. Source: the adaptive variant of Avalanche's
    `ClassBalancedBuffer`, made online.
    """

    def _expect(self, groups: list[int]) -> None:
        # all groups of a batch share from its first row on
        for group in groups:
            if group not in self.members:
                self._open(group)

    def slot(self, group: int, members: Members, uniform: float) -> int | None:
        if len(members) < (self.capacity // len(self.members) or 1):
            return self._new_slot(members, uniform)
        return self._replaced(members, int(uniform * self.group_seen[group]))

    def _replaced(self, members: Members, place: int) -> int | None:
        """Slot that a new row takes within its full group; `place` is uniform over the rows that the group has seen."""
        return members[place] if place < len(members) else None
