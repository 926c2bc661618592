"""The nouns of the platform: a batch and its rows, a stream and its experiences.

Shape legend: B rows of a batch, C outputs of one head, N rows of a data set, F width of the last hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class Setting(StrEnum):
    """What changes between experiences, and what the model is told (van de Ven & Tolias, 2019)."""

    TASK_INCREMENTAL = "task_incremental"
    CLASS_INCREMENTAL = "class_incremental"
    DOMAIN_INCREMENTAL = "domain_incremental"
    CONTINUAL_PRETRAINING = "continual_pretraining"


class Source(StrEnum):
    """Where a row of a batch comes from."""

    CURRENT = "current"
    REPLAY = "replay"
    ANCHOR = "anchor"


class UserError(ValueError):
    """A request that cannot be carried out: one sentence that names the value and the allowed ones (exit code 2)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of consecutive rows with one origin.

    Args:
        start, stop: the rows `[start, stop)`.
        source: where the rows come from.
        owner: name of the strategy that added them; "stream" for current rows.
        weight: factor of the rows' mean cross-entropy in the loss; 0 leaves the loss to the owner's `penalty`.
    """

    start: int
    stop: int
    source: Source = Source.CURRENT
    owner: str = "stream"
    weight: float = 1.0

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
        """This batch followed by `rows`, tagged with their origin; neither operand changes.

        Example:
            >>> one = Batch(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), torch.arange(2))
            >>> [len(p) for p in one.extended(one, Source.REPLAY, "replay").parts]
            [2, 2]
        """
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
        loss: scalar, for backbones that compute their own; None leaves it to the trainer.
        state: recurrent state after the last step, for backbones that carry one.
        auxiliary: terms that the backbone adds to the loss, by name, such as the load balance of experts.
    """

    logits: Tensor
    hidden: Tensor | None = None
    loss: Tensor | None = None
    state: Any = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)


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


Order = Callable[[int, int, torch.Generator], Tensor]
"""(number of rows, epoch, generator) -> (B,) row numbers in the order they are trained on in that epoch."""


def shuffled(num_rows: int, epoch: int, generator: torch.Generator) -> Tensor:
    """Every row once, in random order."""
    return torch.randperm(num_rows, generator=generator)


@dataclass(frozen=True)
class Experience:
    """One step of a stream. Nothing is loaded before `load` is called, and nothing is kept after.

    Args:
        id: position in the stream, from 0.
        name: what tables and figures show.
        domain: name of the `EvalSet` that measures what this experience teaches; re-occurring experiences share it.
        load: returns the training rows.
        num_samples: how many rows `load` returns; known without loading.
        classes: classes that occur, counted within the head.
        task_id: head of the model; None where the setting gives no task label.
        merged: experiences whose rows it holds; a budget in steps or tokens is given once for each of them.
        order: order of the rows in each epoch.
        practises: every domain that rows come from, where that is not `domain` alone: an experience that rehearses
            earlier ones, or that teaches several domains at once (`domain` then need not name an `EvalSet`).
    """

    id: int
    name: str
    domain: str
    load: Callable[[], Data]
    num_samples: int
    classes: tuple[int, ...] = ()
    task_id: int | None = None
    merged: int = 1
    order: Order = shuffled
    practises: tuple[str, ...] = ()


Answer = Callable[[Batch], Output]
"""Stored rows -> what the model, or a strategy in its place, says to them."""

Score = Callable[[Data, Answer, int, int], dict[str, float]]
"""(rows, how they are answered, how many of them to measure on, rows per batch) -> the measure first, then whatever
else is worth a curve, by name."""

IGNORED = -100
"""Target of a token that is not to be learnt; torch's own default for a label to leave out."""


@dataclass(frozen=True)
class EvalSet:
    """Held-out rows of one domain: one column of R.

    Args:
        num_bytes: UTF-8 bytes of text behind all targets, for bits per byte; None where rows are no running text.
        score: measures the domain where the answer to a row is no single prediction, such as text that is compared
            with every label; None takes the share of right predictions, or the mean loss.
    """

    domain: str
    load: Callable[[], Data]
    num_samples: int
    num_bytes: int | None = None
    score: Score | None = None


@dataclass(frozen=True)
class StreamInfo:
    """What a backbone or a strategy may know of a stream before training starts.

    Args:
        input_shape: of one row, after the transform; text may be measured at other lengths.
        num_outputs: outputs of one head.
        num_heads: 1 unless the setting gives task labels.
        measure: what R holds; "accuracy" in [0, 1], or "loss" in nats.
        separator: token that stands before every document of packed text: where it is read, attention and recurrent
            state start anew. None where no row holds two documents.
        tokenizer: digest of what turned text into tokens; a pretrained model must have been trained with the same.
    """

    name: str
    setting: Setting
    input_shape: tuple[int, ...]
    num_outputs: int
    num_experiences: int
    num_heads: int = 1
    measure: Literal["accuracy", "loss"] = "accuracy"
    separator: int | None = None
    tokenizer: str = ""


def as_stored(raw: Tensor) -> Tensor:
    """The transform of a stream whose rows are inputs already; a function with a name, so that streams pickle."""
    return raw


@dataclass(frozen=True)
class Stream:
    """Ordered experiences, the sets that measure them, and how stored rows become inputs.

    Args:
        transform: raw rows (B, ...) -> inputs (B, ...); deterministic, the same for every experience.
        augment: inputs, generator -> inputs; training only.
        augment_rows: rows in training order, generator -> inputs; for the rows that the stream itself delivers it takes
            the place of `augment`, which goes on serving replayed rows.
        check_batch: raises `UserError` for a batch size that the stream cannot be trained with.
        codec: for text, what turned it into tokens, with `encode(texts)`, `decode(tokens)` and `separator`.
        content: digest of the data; a run goes on only with the data that it began with. Empty where nobody checks.
        general: rows of general text that no experience trains on and no domain measures, for strategies that anchor
            a model on it; None where there are none.
    """

    info: StreamInfo
    experiences: Sequence[Experience]
    eval_sets: Sequence[EvalSet]
    transform: Callable[[Tensor], Tensor] = field(default=as_stored)
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    augment_rows: Callable[[Batch, torch.Generator], Tensor] | None = None
    check_batch: Callable[[int], None] | None = None
    codec: Any = None
    content: str = ""
    general: Callable[[], Data] | None = None

    def prepare(self, rows: Batch, generator: torch.Generator | None = None) -> Batch:
        """Stored rows as the backbone reads them; augmented when a generator is given and the stream augments."""
        inputs = self.transform(rows.inputs)
        if self.augment is not None and generator is not None:
            inputs = self.augment(inputs, generator)
        return Batch(inputs, rows.targets, rows.experience_id, rows.sample_ids, rows.task_id, rows.inputs, rows.parts)

    def first(self, num_experiences: int) -> Stream:
        """The first experiences, measured on what they teach."""
        kept = self.experiences[:num_experiences]
        domains = {domain for experience in kept for domain in (experience.domain, *experience.practises)}
        measured = [eval_set for eval_set in self.eval_sets if eval_set.domain in domains]
        info = replace(self.info, num_experiences=len(kept))
        return replace(self, info=info, experiences=kept, eval_sets=measured or self.eval_sets)

    @property
    def trained_domains(self) -> list[int]:
        """Column of R that each experience teaches; -1 where no single column does."""
        columns = {eval_set.domain: j for j, eval_set in enumerate(self.eval_sets)}
        return [columns.get(experience.domain, -1) for experience in self.experiences]

    @property
    def practised_domains(self) -> list[list[int]]:
        """Columns of R whose rows each experience trains on; empty when that is `trained_domains` throughout."""
        if not any(experience.practises for experience in self.experiences):
            return []
        columns = {eval_set.domain: j for j, eval_set in enumerate(self.eval_sets)}
        return [
            sorted(columns[name] for name in {each.domain, *each.practises} if name in columns)
            for each in self.experiences
        ]
