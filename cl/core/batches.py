"""The rows of a batch and of a data set, and what a backbone says to them.

Shape legend: B rows of a batch, C outputs of one head, N rows of a data set, F width of the last hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor


class Source(StrEnum):
    """Where a row of a batch comes from."""

    CURRENT = "current"
    REPLAY = "replay"
    ANCHOR = "anchor"


@dataclass(frozen=True, slots=True)
class Part:
    """A run of consecutive rows with one origin.

    Args:
        start, stop: the rows `[start, stop)`.
        source: where the rows come from.
        owner: name of the strategy that added them; "stream" for current rows.
        weight: factor of the rows' mean cross-entropy in the loss; 0 leaves the loss to the owner's `penalty`.
        share: factor of a mean over these rows, so that its mean over all processes is that over the rows of all
            (`cl.distributed`); 1 in a single process. `weight` holds it already, a `penalty` multiplies by it.
        elsewhere: rows of the part that other processes work on.
    """

    start: int
    stop: int
    source: Source = Source.CURRENT
    owner: str = "stream"
    weight: float = 1.0
    share: float = 1.0
    elsewhere: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


@lru_cache(maxsize=64)
def _all_current(num_rows: int) -> tuple[Part, ...]:
    """One current part; the same object for every batch of a size, since each step makes several."""
    return (Part(0, num_rows),)


@dataclass(slots=True)
class Batch:
    """Rows on their way through a strategy into a backbone.

    Args:
        inputs: (B, ...) what the backbone reads: floats for images, token ids for text.
        targets: (B,) class within the head, or (B, T) next tokens; `IGNORED` where one is not to be learnt.
        experience_id: (B,) experience each row was first seen in.
        sample_ids: (B,) row number in the data set of that experience.
        task_id: (B,) head each row belongs to; None where the setting gives no task label.
        raw: (B, ...) the rows as stored, before transform and augmentation; what a buffer should keep.
        parts: origin of the rows, in order and without gaps. Current rows always come first.
    """

    inputs: Tensor
    targets: Tensor
    experience_id: Tensor
    sample_ids: Tensor
    task_id: Tensor | None = None
    raw: Tensor | None = None
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            self.parts = _all_current(self.inputs.shape[0])

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def num_current(self) -> int:
        return self.parts[0].stop

    @property
    def heads(self) -> Tensor:
        """(B,) the head of each row that has one class; 0 where the setting gives no task label."""
        return torch.zeros_like(self.targets) if self.task_id is None else self.task_id

    @property
    def stored(self) -> Tensor:
        """(B, ...) the rows as stored; what the backbone reads where nothing else was kept."""
        return self.inputs if self.raw is None else self.raw

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The given rows as a batch of one current part."""
        return Batch(
            self.inputs[rows],
            self.targets[rows],
            self.experience_id[rows],
            self.sample_ids[rows],
            None if self.task_id is None else self.task_id[rows],
            None if self.raw is None else self.raw[rows],
        )

    def current(self) -> Batch:
        """Only the rows that the stream delivered; the batch itself when it holds nothing else."""
        return self if len(self.parts) == 1 else self[self.parts[0].rows]

    def parts_of(self, owner: str) -> list[Part]:
        """The parts that the strategy `owner` added, in the order it added them."""
        return [part for part in self.parts if part.owner == owner]

    def extended(self, rows: Batch, source: Source, owner: str, weight: float = 1.0) -> Batch:
        """This batch followed by `rows`, tagged with their origin; neither operand changes. No rows make no part.

        Example:
            >>> one = Batch(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), torch.arange(2))
            >>> [len(p) for p in one.extended(one, Source.REPLAY, "replay").parts]
            [2, 2]
        """
        if len(rows) == 0:
            return self
        both = Batch.cat((self, rows))
        both.parts = (*self.parts, Part(len(self), len(both), source, owner, weight))
        return both

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Rows of several batches as one current part."""

        def joined(name: str) -> Any:
            columns = [getattr(batch, name) for batch in batches]
            return None if any(column is None for column in columns) else torch.cat(columns)

        columns: dict[str, Any] = {name: joined(name) for name in COLUMNS}
        return Batch(**columns)

    def to(self, device: torch.device) -> Batch:
        if self.inputs.device == device:
            return self
        columns = {name: getattr(self, name) for name in COLUMNS}
        moved: dict[str, Any] = {
            name: c if c is None else c.to(device, non_blocking=True) for name, c in columns.items()
        }
        return Batch(**moved, parts=self.parts)


COLUMNS = ("inputs", "targets", "experience_id", "sample_ids", "task_id", "raw")


@dataclass(slots=True)
class Output:
    """What a backbone returns.

    Args:
        logits: (B, C) for classification, (B, T, vocabulary) for language.
        hidden: (B, F) input of the head, for strategies that work on features.
        state: what the batch leaves behind, for backbones that carry it on, or write from it (`Backbone.commit`). Who
            answers with other logits in the backbone's place hands it on; None where the backbone did not read the
            batch by itself, and there is nothing to write.
        auxiliary: terms that the backbone adds to the loss, by name, such as the load balance of experts.
    """

    logits: Tensor
    hidden: Tensor | None = None
    state: Any = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)

    @property
    def features(self) -> Tensor:
        """`hidden`, for those that cannot do without.

        Raises:
            ValueError: the backbone does not say what its head reads.
        """
        if self.hidden is None:
            raise ValueError("the backbone does not say what its head reads (`Output.hidden` is None)")
        return self.hidden


class Data(Protocol):
    """Rows that can be fetched by number, many at once."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Batch:
        """Rows `index` (B,) as stored: `inputs` holds what `Batch.raw` will hold after the transform."""
        ...


@dataclass(frozen=True)
class TensorData:
    """Rows held in tensors, as small as they were read (uint8 images stay uint8 until a batch is formed).

    Args:
        inputs: (N, ...) any dtype.
        targets: (N,) int64.
        experience_id, task_id: one number for all rows, or (N,) int64.
        view: inputs of some rows -> what they show, such as their pixels permuted; None shows them as they are. Only
            rows that are asked for are changed, so that experiences which show the same images share their memory.
    """

    inputs: Tensor
    targets: Tensor
    experience_id: int | Tensor = 0
    task_id: int | Tensor | None = None
    view: Callable[[Tensor], Tensor] | None = None

    @property
    def shown(self) -> Tensor:
        """(N, ...) every row as `rows` gives it."""
        return self.inputs if self.view is None else self.view(self.inputs)

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def rows(self, index: Tensor) -> Batch:
        inputs = self.inputs.index_select(0, index)
        return Batch(
            inputs if self.view is None else self.view(inputs),
            self.targets.index_select(0, index),
            _column(self.experience_id, index),
            index,
            None if self.task_id is None else _column(self.task_id, index),
        )

    @staticmethod
    def concat(pieces: Sequence[TensorData]) -> TensorData:
        """All rows of `pieces` in order, each keeping its experience and task."""
        every = [(piece, torch.arange(len(piece))) for piece in pieces]
        has_tasks = pieces[0].task_id is not None
        return TensorData(
            torch.cat([piece.shown for piece in pieces]),
            torch.cat([piece.targets for piece in pieces]),
            torch.cat([_column(piece.experience_id, index) for piece, index in every]),
            torch.cat([_column(piece.task_id, index) for piece, index in every if piece.task_id is not None])
            if has_tasks
            else None,
        )


def _column(value: int | Tensor, index: Tensor) -> Tensor:
    """`value` for each row of `index`; a constant is expanded without being copied."""
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    return torch.tensor(value).expand(index.shape[0])
