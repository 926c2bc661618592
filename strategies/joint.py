"""Joint training: all rows at once, in one experience; the upper reference of every comparison.

Source: the "joint" or "offline" row of the field's tables, such as van de Ven & Tolias, "Three scenarios for continual
learning", 2019.
Differences: none. The one experience gets the budget of all that it holds, in epochs, steps or tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cl.core import Experience, Setting, Stream
from cl.hooks import Contract, Strategy
from strategies._joined import joined_classes, load_joined


class Joint(Strategy):
    """Train once on everything.

    Cost: no rows beyond the stream's own, but all data sets in memory at once.
    """

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(
        why_not_zero="it changes the data, not the loss",
        why_not_better="it has one experience, and forgetting needs two",
    )

    def plan(self, stream: Stream) -> Stream:
        every = list(stream.experiences)
        whole = Experience(
            id=0,
            name="all experiences",
            domain="all experiences",
            load=partial(load_joined, every),
            num_samples=sum(experience.num_samples for experience in every),
            classes=joined_classes(every),
            merged=len(every),
        )
        return replace(stream, info=replace(stream.info, num_experiences=1), experiences=[whole])
