"""GDumb: keep a balanced buffer, greedily, and train from scratch on nothing else whenever a model is asked for.

    sampler, row by row:  take it while there is room, or while its class has fewer than capacity / classes seen rows;
                          then a row of the largest class, at random, makes room
    learner:              before experience k is measured, weights start again from their first values and are trained
                          on the buffer as it is after the rows of experience k

Source: Prabhu, Torr & Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020.
Differences: the paper takes no row of a class that has its share, even while there is room; here the buffer is always
full, which ends in the same counts unless a class runs out of rows, and is known to be so before anything is loaded.
The paper trains once, at the end; here, as in Avalanche, once for every row of R, each time from the same first
weights. The official code of the offline experiments takes the first capacity / all classes rows of each class. Its
schedule (warm-up, cosine with restarts, cutmix) is the run's business: `schedule_span=experience` starts it anew each
time. Rows of an experience reach the sampler in random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl.buffers._grouped import Grouped, Members
from cl.buffers.base import Buffer, stored_rows
from cl.core import Batch, Data, Experience, Stream, shuffled
from cl.hooks import Contract, Strategy
from cl.seeding import Seeds
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_count
from strategies._joined import joined_classes, joined_domains
from strategies._quadratic import copied
from strategies.update_periods import require_no_carry


class Gdumb(Strategy):
    """Train from scratch on a greedily balanced buffer.

    Args:
        capacity: rows stored, and all that a model is trained on.

    Raises:
        UserError: fewer rows than classes, or a strategy beside it that carries gradients on.

    Cost: no rows beyond the planned ones, min(capacity, rows so far) for every experience; the buffer and one copy of
    the first weights.
    """

    moves_weights = True
    contract = Contract(toy={"capacity": 300}, why_not_zero="it changes the data, not the loss", forgets_less_by=0.2)

    def __init__(self, capacity: int = 1000) -> None:
        require_count("gdumb.capacity", capacity)
        self.buffer = GreedyBalanced(capacity)
        self.num_taken = 0
        self.first: dict[str, Tensor] = {}
        self._seeds: Seeds | None = None
        self._sources: list[Experience] = []

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        require_no_carry(self, strategies, "starts anew")

    def check(self, stream: Stream) -> None:
        super().check(stream)
        num = stream.info.num_outputs * stream.info.num_heads
        allowed = f"at least {num}, one row for each class of the stream"
        require(self.buffer.capacity >= num, "gdumb.capacity", self.buffer.capacity, allowed)

    def plan(self, stream: Stream) -> Stream:
        self._sources = list(stream.experiences)
        return replace(stream, experiences=[self._planned(k) for k in range(len(self._sources))])

    def _planned(self, k: int) -> Experience:
        seen = self._sources[: k + 1]
        num_rows = min(self.buffer.capacity, sum(experience.num_samples for experience in seen))
        load = partial(self._load, k)
        return replace(
            seen[-1],
            load=load,
            num_samples=num_rows,
            order=shuffled,
            classes=joined_classes(seen),
            practises=joined_domains(seen, self._sources),
        )

    def _load(self, k: int) -> Data:
        """The buffer after experience k. It goes forward only: rows that were given up do not come back."""
        assert self._seeds is not None, "the buffer is filled by a run"
        assert k + 1 >= self.num_taken, f"the buffer has moved on to experience {self.num_taken - 1}"
        for number in range(self.num_taken, k + 1):
            data, generator = self._sources[number].load(), self._seeds.fresh(self.name, number)
            for rows in stored_rows(data, torch.randperm(len(data), generator=generator)):
                self.buffer.add(rows, generator)
        self.num_taken = max(self.num_taken, k + 1)
        return BufferData(self.buffer)

    def on_run_start(self, state: TrainState) -> None:
        self._seeds = state.seeds
        self.first = {name: value.detach().clone() for name, value in state.model.state_dict().items()}

    def on_resume(self, state: TrainState) -> None:
        self._seeds = state.seeds

    def on_experience_start(self, state: TrainState) -> None:
        state.model.load_state_dict(self.first)
        state.optimizer.state.clear()

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.buffer.columns, self.first))

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "num_taken": self.num_taken, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.num_taken, self.first = state["num_taken"], copied(state["first"])


class GreedyBalanced(Grouped):
    """Rows stay as long as their class is not the largest one when another class needs room; within a class, early
    rows stay."""

    def slot(self, group: int, members: Members, uniform: float) -> int | None:
        has_room = self.filled < self.capacity or len(members) * len(self.members) < self.capacity
        return self._new_slot(members, uniform) if has_room else None


class BufferData:
    """What a buffer holds, as a data set.

    Args:
        buffer: read when rows are asked for.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer

    def __len__(self) -> int:
        return len(self.buffer)

    def rows(self, index: Tensor) -> Batch:
        return self.buffer.rows(index)
