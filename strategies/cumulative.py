"""Cumulative training: every experience trains on all rows so far; what forgetting costs when memory does not matter.

Source: Avalanche's `Cumulative` strategy; also the "joint incremental" rows of class-incremental surveys.
Differences: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from cl.core import Experience, Setting, Stream, shuffled
from cl.hooks import Contract, Strategy
from strategies._joined import joined_classes, joined_domains, load_joined


class Cumulative(Strategy):
    """Train on experiences 0 to k in turn.

    Cost: no rows beyond the planned ones, but their number grows with every experience, and all are in memory.
    """

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(why_not_zero="it changes the data, not the loss", forgets_less_by=0.4)

    def plan(self, stream: Stream) -> Stream:
        return replace(stream, experiences=list(_grown(list(stream.experiences))))


def _grown(experiences: Sequence[Experience]) -> Iterator[Experience]:
    for k, experience in enumerate(experiences):
        seen = experiences[: k + 1]
        yield replace(
            experience,
            load=partial(load_joined, seen),
            num_samples=sum(earlier.num_samples for earlier in seen),
            classes=joined_classes(seen),
            merged=len(seen),
            order=shuffled if k else experience.order,
            practises=joined_domains(seen, experiences),
        )
