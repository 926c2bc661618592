"""Rows that a strategy adds to a whole optimizer step, whatever the micro-batches that it is made of.

A step of N rows of the stream may be cut into micro-batches to save memory, and each of their losses is multiplied by
what the micro-batch counts (`TrainState.share`). Rows that are added here are drawn once for the step and have that
factor divided out, so that a step does not depend on how it is cut. `Spread` shows some of them beside every
micro-batch, as it must where they are as many as the stream's; `added` lets a few ride along with the last one, where
also a mean over them is the same whose denominator depends on the model, or a weight that depends on the loss of the
whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from cl.core import Batch, Source
from cl.state import TrainState, shares


def is_last(state: TrainState) -> bool:
    """Whether the running micro-batch is the last one of its step."""
    return state.micro_step == state.micro_steps - 1


def row_share(batch: Batch, num_rows: int, num_current: int) -> float:
    """Share of added rows in a loss in which each counts what a row of the stream counts: n / (n + N / w).

    Args:
        batch: as the strategies before have left it; w is what they have left of the weight of the stream's rows.
        num_rows: n, added now.
        num_current: N, rows of the stream among which w is shared.
    """
    # a strategy that owns the loss of the stream's rows leaves them no weight
    return num_rows / max(1, num_rows + num_current / (batch.parts[0].weight or 1.0))


def lighter(batch: Batch, share: float) -> Batch:
    """The batch, whose label loss leaves so much of the whole to rows that are still to come."""
    return replace(batch, parts=tuple(replace(part, weight=part.weight * (1 - share)) for part in batch.parts))


def added(
    state: TrainState,
    batch: Batch,
    num_rows: int,
    rows: Callable[[], Batch],
    source: Source,
    owner: str,
    weight: float | None = None,
) -> Batch:
    """The batch, with `num_rows` rows more in the last micro-batch.

        loss = (1 - s) * what the loss was + s * CE(rows),  s of `row_share`     (weight None: a row is a row)
        loss = what the loss was + weight * CE(rows)

    Args:
        rows: asked in the last micro-batch only.
    """
    if num_rows == 0:
        return batch
    factor = row_share(batch, num_rows, state.step_rows) if weight is None else weight
    if weight is None:
        batch = lighter(batch, factor)
    return batch.extended(rows(), source, owner, factor / state.share) if is_last(state) else batch


class Spread:
    """Rows drawn once for a step, of which each micro-batch shows the share that it has of the stream's.

        mean over all rows = sum over micro-batches of share * factor * mean over the rows that one shows

    Attributes:
        factor: of any mean over the rows shown now; 1 in a step that is not cut, 0 when there are none.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._drawn: tuple[Any, ...] = ()
        self._num_passed = self._num_shown = 0

    def shown(self, state: TrainState, batch: Batch, draw: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The rows that go with a micro-batch, and what belongs to them.

        Args:
            draw: gives the rows of the step as a batch, and tensors with an entry for each of them; asked in its first
                micro-batch only.
        """
        if state.micro_step == 0:
            self._drawn, self._num_passed, self._num_shown = draw(), 0, 0
        if state.micro_steps == 1:
            self.factor = 1.0
            return self._drawn
        rows: Batch = self._drawn[0]
        self._num_passed += batch.num_current
        low, high = self._num_shown, len(rows) * self._num_passed // state.step_rows
        self._num_shown = high
        self.factor = shares((rows[low:high], rows[:low], rows[high:]))[0] / state.share if high > low else 0.0
        return tuple(each[low:high] for each in self._drawn)


class StepLoss:
    """Label loss of the running step, added up over its micro-batches; noting a micro-batch twice changes nothing."""

    def __init__(self) -> None:
        self.terms: dict[int, Tensor] = {}

    def note(self, state: TrainState, loss: Tensor) -> None:
        """Take note of the label loss of the running micro-batch."""
        if state.micro_step == 0:
            self.terms = {}
        self.terms[state.micro_step] = state.share * loss.detach()

    def total(self) -> Tensor:
        terms = list(self.terms.values())
        return sum(terms[1:], start=terms[0])
