"""From an experience to batches: how long to train, and which rows come next.

Both are pure functions of (seed, experience, position), so a run resumes exactly from one integer and nothing about
the data order needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cl.core import Batch, Data, Experience, Setting, Stream, StreamInfo, UserError
from cl.state import TrainState

BLOCK_BYTES = 1 << 20
"""Rows are gathered and transformed a block at a time: fewer small operations, and a block still fits the cache."""


@dataclass(frozen=True)
class Budget:
    """How long to train on one experience: in epochs, optimizer steps or tokens (a row that is no text is one token).

    Args:
        max_steps: of every experience, or a list with those of each.

    Raises:
        UserError: more than one of the three is given, or one is not positive.
    """

    epochs: int | None = None
    max_steps: int | Sequence[int] | None = None
    max_tokens: int | None = None
    batch_size: int = 64
    accumulation: int = 1

    def __post_init__(self) -> None:
        limits = {"epochs": self.epochs, "max_steps": self.max_steps, "max_tokens": self.max_tokens}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"trainer has {' and '.join(given)}; a budget is exactly one of {', '.join(limits)}")
        for name, value in (given | {"batch_size": self.batch_size, "accumulation": self.accumulation}).items():
            entries = value if name == "max_steps" and isinstance(value, list | tuple) and value else [value]
            if not all(type(entry) is int and entry >= 1 for entry in entries):
                several = ", or a list of one for each experience" if name == "max_steps" else ""
                raise UserError(f"trainer.{name} is {value!r}; it must be an integer of at least 1{several}")

    def batches_per_epoch(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.batch_size)

    def steps_per_epoch(self, num_rows: int) -> int:
        return math.ceil(self.batches_per_epoch(num_rows) / self.accumulation)

    def steps(self, num_rows: int, tokens_per_row: int = 1) -> int:
        """Optimizer steps on an experience of `num_rows` rows; the fewest that reach `max_tokens`.

        Example:
            >>> Budget(epochs=2, batch_size=10).steps(95), Budget(max_tokens=100, batch_size=32).steps(1000)
            (20, 4)
        """
        if isinstance(self.max_steps, int):
            return self.max_steps
        if self.max_tokens is not None:
            # epochs end in a smaller step, so whole epochs are counted apart
            epochs, rows = divmod(math.ceil(self.max_tokens / tokens_per_row), max(1, num_rows))
            return epochs * self.steps_per_epoch(num_rows) + math.ceil(rows / (self.batch_size * self.accumulation))
        return (self.epochs or 1) * self.steps_per_epoch(num_rows)


def steps_in(experience: Experience, budget: Budget, info: StreamInfo) -> int:
    """Optimizer steps on an experience, known without loading it.

    One that holds the rows of several gets the steps or tokens of as many: joint training is as long as the course that
    it is compared with, whatever the budget counts. A list of steps is taken as it is.
    """
    if isinstance(budget.max_steps, list | tuple):
        return budget.max_steps[experience.id]
    times = experience.merged
    whole = replace(
        budget,
        max_steps=budget.max_steps * times if isinstance(budget.max_steps, int) else None,
        max_tokens=budget.max_tokens and budget.max_tokens * times,
    )
    return whole.steps(experience.num_samples, tokens_per_row(info))


def tokens_per_row(info: StreamInfo) -> int:
    """What one row takes from a budget in tokens; known without loading anything."""
    return math.prod(info.input_shape) if info.setting == Setting.CONTINUAL_PRETRAINING else 1


def steps_from(
    state: TrainState, experience: Experience, data: Data, budget: Budget, start: int
) -> Iterator[tuple[int, Sequence[Batch]]]:
    """Yield (epoch, list of micro-batches) for each optimizer step of an experience, from step `start` on.

    Args:
        start: optimizer steps already taken in this experience.
    """
    per_epoch = budget.steps_per_epoch(len(data))
    step, last = start, steps_in(experience, budget, state.info)
    while step < last:
        epoch, offset = divmod(step, per_epoch)
        batches = _epoch(state, experience, data, budget, epoch, offset * budget.accumulation)
        for micro_batches in _grouped(batches, budget.accumulation):
            yield epoch, micro_batches
            step += 1
            if step == last:
                return


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[Sequence[Batch]]:
    if size == 1:
        yield from ((batch,) for batch in batches)
        return
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _epoch(
    state: TrainState, experience: Experience, data: Data, budget: Budget, epoch: int, first: int
) -> Iterator[Batch]:
    """Micro-batches of one epoch in its order, from micro-batch `first` on."""
    size = budget.batch_size
    order = experience.order(len(data), epoch, state.seeds.fresh("order", experience.id, epoch))
    if len(order) != len(data):
        raise UserError(
            f"the order of experience {experience.id} ({experience.name!r}) names {len(order)} rows in epoch {epoch}; "
            f"it must name as many as there are, {len(data)}"
        )
    stream, at = state.stream, first * size
    block_rows = size
    while at < len(order):
        rows = data.rows(order[at : at + block_rows])
        block = stream.prepare(rows).to(state.device)
        for low in range(0, len(block), size):
            batch = block[low : low + size]
            if stream.augment_rows is not None or stream.augment is not None:
                # a generator per micro-batch keeps augmentation a function of the position
                generator = state.seeds.fresh("augment", experience.id, epoch, (at + low) // size)
                batch.inputs = augmented(stream, batch, generator)
            yield batch
        at += block_rows
        row_bytes = max(1, block.inputs[0].numel() * block.inputs.element_size())
        block_rows = size * max(1, BLOCK_BYTES // (row_bytes * size))


def augmented(stream: Stream, batch: Batch, generator: torch.Generator) -> Tensor:
    """Inputs of rows that the stream delivers, changed at random as it says."""
    if stream.augment_rows is not None:
        return stream.augment_rows(batch, generator)
    return batch.inputs if stream.augment is None else stream.augment(batch.inputs, generator)


def require_rows(experience: Experience, num_rows: int) -> None:
    """An experience without rows cannot be trained on."""
    if num_rows == 0:
        raise UserError(f"experience {experience.id} ({experience.name!r}) has no training rows")


def check_rows(data: Data, experience: Experience) -> None:
    """The rows that were announced, and some."""
    require_rows(experience, len(data))
    if len(data) != experience.num_samples:
        raise UserError(
            f"experience {experience.id} ({experience.name!r}) announced {experience.num_samples} rows "
            f"but its data holds {len(data)}"
        )
