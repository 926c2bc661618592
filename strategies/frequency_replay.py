"""Replay by how rarely a class comes back: a store for every class, and only rare classes are replayed.

At the start of an experience up to as many classes as it has are chosen among those it does not have: the least
frequent ones that occurred at least three times, with low < f_c <= high, f_c = occurrences of c / experiences so far (a
replay counts as an occurrence). All their stored rows are replayed once per epoch, in one mean with the current rows.
At its end the store of each of its classes takes rows anew: all at the first occurrence, max(n / (o + 1), n / 20)
random ones after o earlier occurrences.

Source: Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting and Knowledge Accumulation", CoLLAs
2023 (SCoLe), and TLESORT/SCoLe-SCaling-Continual-Learning (replay.py, main.py): `select` is FrequencyReplay, freq_acc
and RandomReplay.
Differences: the code appends replayed rows to the data of the task, which lengthens it; here they are spread evenly
over the task's own steps, so that every strategy takes the same number of steps. For freq_acc the code takes the
accuracy on 10 % of the task's rows that it holds out; here on the current rows as they are trained on. At least one row
is taken anew, where the code rounds n / 20 down to 0 for stores of less than 20.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl.buffers.base import COLUMNS, stored_rows
from cl.core import Batch, Output, Setting, Source, Stream, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_choice, require_count, require_number
from strategies._pooled import Spread, is_last

SELECTIONS = ("frequency", "freq_acc", "random")


class FrequencyReplay(Strategy):
    """Replay stored rows of rare classes.

    Args:
        rows_per_class: n, rows stored of each class; 0 stores and replays nothing.
        select: "frequency"; "freq_acc" counts an occurrence by the accuracy reached in it; "random" replays classes
            that were seen before, whatever their frequency.
        low_frequency, high_frequency: replayed classes lie above the first, and not above the second.
        min_occurrences: before a class can be replayed by its frequency.
        budget: for random: expected classes replayed, as a share of those that the experience has.

    Cost: rows_per_class more rows forward and backward per replayed class and epoch.
    """

    settings = frozenset({Setting.CLASS_INCREMENTAL})
    contract = Contract(toy={"select": "random", "rows_per_class": 48}, zero={"rows_per_class": 0}, forgets_less_by=0.2)

    def __init__(
        self,
        rows_per_class: int = 200,
        select: str = "frequency",
        low_frequency: float = 0.01,
        high_frequency: float = 0.1,
        min_occurrences: int = 3,
        budget: float = 1.0,
    ) -> None:
        is_count = isinstance(rows_per_class, int) and not isinstance(rows_per_class, bool) and rows_per_class >= 0
        name = self.name
        require(is_count, f"{name}.rows_per_class", rows_per_class, "an integer of at least 0")
        require_choice(f"{name}.select", select, SELECTIONS)
        require_number(f"{name}.low_frequency", low_frequency)
        require_number(f"{name}.high_frequency", high_frequency)
        require(
            high_frequency > low_frequency,
            f"{name}.high_frequency",
            high_frequency,
            f"above {name}.low_frequency={low_frequency:g}",
        )
        require_count(f"{name}.min_occurrences", min_occurrences)
        require_number(f"{name}.budget", budget)
        require(budget <= 1, f"{name}.budget", budget, "at most 1")
        self.rows_per_class, self.select = rows_per_class, select
        self.low_frequency, self.high_frequency = low_frequency, high_frequency
        self.min_occurrences, self.budget = min_occurrences, budget
        self.store: dict[int, Batch] = {}
        self.occurrences: dict[int, int] = {}
        self.weights: dict[int, float] = {}
        self.num_experiences = 0
        # of the experience going on
        self.replayed: list[int] = []
        self.queue: list[int] = []
        self.num_seen = 0
        self.hits: dict[int, list[int]] = {}
        self.spread = Spread()

    def check(self, stream: Stream) -> None:
        for experience in stream.experiences:
            if not experience.classes:
                raise UserError(
                    f"{self.name} counts how often classes come back, and experience {experience.id} "
                    f"({experience.name!r}) of stream {stream.info.name} does not say which it has"
                )

    def generator(self, state: TrainState) -> torch.Generator:
        return state.seeds.named(self.name)

    # which classes

    def on_experience_start(self, state: TrainState) -> None:
        self.queue, self.num_seen, self.hits, self.replayed = [], 0, {}, []
        if self.rows_per_class > 0:
            current = state.experience.classes
            is_random = self.select == "random"
            self.replayed = self._any(current, self.generator(state)) if is_random else self._rare(current)

    def _rare(self, current: Sequence[int]) -> list[int]:
        """Up to as many classes as there are current ones, the least frequent first."""
        chosen: list[int] = []
        for c in sorted(self._stored_besides(current), key=lambda c: (self.weights[c], c)):
            if self.occurrences[c] < self.min_occurrences:
                continue
            frequency = self.weights[c] / self.num_experiences
            # the next ones are more frequent still
            if len(chosen) == len(current) or frequency > self.high_frequency:
                break
            if frequency > self.low_frequency:
                chosen.append(c)
        return chosen

    def _stored_besides(self, current: Sequence[int]) -> list[int]:
        """Classes that are not in the experience; one that an experience names need not have had rows in it."""
        return [c for c in self.occurrences if c not in current and c in self.store]

    def _any(self, current: Sequence[int], generator: torch.Generator) -> list[int]:
        """A binomial number of classes seen before, each as likely as any other."""
        count = int((torch.rand(len(current), generator=generator) < self.budget).sum())
        seen = self._stored_besides(current)
        return [seen[i] for i in torch.randperm(len(seen), generator=generator)[:count].tolist()]

    # which rows

    def _pool_size(self) -> int:
        return sum(len(self.store[c]) for c in self.replayed)

    def num_due(self, state: TrainState, batch_size: int) -> int:
        """Rows to replay beside so many of the stream, so that an epoch replays every one of them once."""
        if not self.replayed or not state.has_begun:
            return 0
        pool, rows = self._pool_size(), len(state.data)
        return pool * (self.num_seen + batch_size) // rows - pool * self.num_seen // rows

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        due = self.num_due(state, state.step_rows)
        if is_last(state):
            self.num_seen += state.step_rows
        if due == 0:
            return batch
        (rows,) = self.spread.shown(state, batch, lambda: self._next(state, due))
        # one mean of the current rows and these; parts of others are theirs
        current, *others = batch.parts
        both = state.step_rows + due
        current = replace(current, weight=current.weight * state.step_rows / both)
        lighter = replace(batch, parts=(current, *others))
        return lighter.extended(rows, Source.REPLAY, self.name, due / both * self.spread.factor)

    def _next(self, state: TrainState, due: int) -> tuple[Batch]:
        """Rows of a step, in an order that is drawn anew each time all of them were there."""
        generator = self.generator(state)
        while len(self.queue) < due:
            self.queue += torch.randperm(self._pool_size(), generator=generator).tolist()
        index, self.queue = torch.tensor(self.queue[:due]), self.queue[due:]
        pool = Batch.cat([self.store[c] for c in self.replayed])
        return (state.prepare(pool[index.to(pool.targets.device)], generator),)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.select != "freq_acc":
            return
        is_right = output.logits.argmax(-1) == batch.targets
        for c in batch.targets.unique().tolist():
            own = is_right[batch.targets == c]
            right, shown = self.hits.get(c, [0, 0])
            self.hits[c] = [right + int(own.sum()), shown + len(own)]

    # what is kept

    def on_experience_end(self, state: TrainState) -> None:
        if self.rows_per_class == 0:
            return
        generator = self.generator(state)
        targets = torch.cat([rows.targets for rows in stored_rows(state.data)])
        for c in targets.unique().tolist():
            (mine,) = (targets == c).nonzero(as_tuple=True)
            picks = mine[torch.randperm(len(mine), generator=generator)[: self.num_renewed(c)]]
            self._renew(c, Batch.cat(list(stored_rows(state.data, picks))), generator)
        self.num_experiences += 1
        for c in [*state.experience.classes, *self.replayed]:
            right, shown = self.hits.get(c, [0, 0])
            # what is replayed is no current row, so it has no accuracy, as in the code
            reached = right / shown if shown else 0.0
            self.occurrences[c] = self.occurrences.get(c, 0) + 1
            self.weights[c] = self.weights.get(c, 0.0) + (reached if self.select == "freq_acc" else 1.0)
        self.replayed = []

    def num_renewed(self, c: int) -> int:
        """Rows of class c that are stored anew."""
        before = self.occurrences.get(c, 0)
        return max(self.rows_per_class // (before + 1), self.rows_per_class // 20, 1)

    def _renew(self, c: int, rows: Batch, generator: torch.Generator) -> None:
        held = self.store.get(c)
        if held is not None:
            kept = torch.randperm(len(held), generator=generator)[len(rows) :].sort().values
            rows = Batch.cat([held[kept.to(held.targets.device)], rows])
        # Batch.cat keeps inputs as stored; `raw` would be a second copy
        rows.raw = None
        self.store[c] = rows

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        due = self.num_due(state, batch_size)
        kept = [getattr(rows, name) for rows in self.store.values() for name in (*COLUMNS, "inputs")]
        return Cost(due, due, tensor_bytes([column for column in kept if isinstance(column, Tensor)]))

    def state_dict(self) -> dict[str, Any]:
        names = [name for name in (*COLUMNS, "inputs") if name != "raw"]
        return {
            "classes": list(self.store),
            "rows": [{name: getattr(rows, name) for name in names} for rows in self.store.values()],
            "occurrences": [list(self.occurrences), list(self.occurrences.values())],
            "weights": [list(self.weights), list(self.weights.values())],
            "num_experiences": self.num_experiences,
            "experience": [list(self.replayed), list(self.queue), self.num_seen],
            "hits": [list(self.hits), list(self.hits.values())],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # beside the rows of the stream, which are on the CPU
        kept = [{name: value.cpu() for name, value in rows.items() if value is not None} for rows in state["rows"]]
        self.store = {c: Batch(**rows) for c, rows in zip(state["classes"], kept, strict=True)}
        self.occurrences = dict(zip(*state["occurrences"], strict=True))
        self.weights = dict(zip(*state["weights"], strict=True))
        self.num_experiences = state["num_experiences"]
        replayed, queue, self.num_seen = state["experience"]
        self.replayed, self.queue = list(replayed), list(queue)
        self.hits = {c: list(pair) for c, pair in zip(*state["hits"], strict=True)}
