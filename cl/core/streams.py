"""Experiences, what measures them, and the stream they make up.

Shape legend: B rows of a batch, N rows of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

from cl.core.batches import Batch, Data, Output


class Setting(StrEnum):
    """What changes between experiences, and what the model is told (van de Ven & Tolias, 2019)."""

    TASK_INCREMENTAL = "task_incremental"
    CLASS_INCREMENTAL = "class_incremental"
    DOMAIN_INCREMENTAL = "domain_incremental"
    CONTINUAL_PRETRAINING = "continual_pretraining"


class UserError(ValueError):
    """A request that cannot be carried out: one sentence that names the value and the allowed ones (exit code 2)."""


LARGEST_INTEGER = 2**63 - 1
"""What torch takes for an integer."""
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


def _taught(experiences: Iterable[Experience]) -> set[str]:
    return {domain for experience in experiences for domain in (experience.domain, *experience.practises)}


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
        """The first experiences, measured on what they teach and on what no experience does."""
        kept = self.experiences[:num_experiences]
        later = _taught(self.experiences) - _taught(kept)
        measured = [eval_set for eval_set in self.eval_sets if eval_set.domain not in later]
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
