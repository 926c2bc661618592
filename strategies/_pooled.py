"""Rows that a strategy adds to a whole optimizer step, whatever the micro-batches that it is made of.

A step of N rows of the stream may be cut into micro-batches, and each of their losses is multiplied by what the
micro-batch counts (`TrainState.share`). Rows that are added here ride along with the last one and have that factor
divided out, so that a step does not depend on how it is cut: neither the weight of the added rows, nor a mean over them
whose denominator depends on the model, nor a weight that depends on the loss of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from cl.core import Batch, Source
from cl.state import TrainState


def is_last(state: TrainState) -> bool:
    """Whether the running micro-batch is the last one of its step."""
    return state.micro_step == state.micro_steps - 1


def row_share(state: TrainState, num_rows: int) -> float:
    """Share of the added rows in a step when every row counts the same: n / (n + N)."""
    return num_rows / max(1, num_rows + state.step_rows)


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

        loss = (1 - s) * what the loss was + s * CE(rows),  s = n / (n + N)     (weight None: a row is a row)
        loss = what the loss was + weight * CE(rows)

    Args:
        rows: asked in the last micro-batch only.
    """
    if num_rows == 0:
        return batch
    factor = row_share(state, num_rows) if weight is None else weight
    if weight is None:
        batch = replace(batch, parts=tuple(replace(p, weight=p.weight * (1 - factor)) for p in batch.parts))
    return batch.extended(rows(), source, owner, factor / state.share) if is_last(state) else batch


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
