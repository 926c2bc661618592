"""Who watches a run: progress bars, trackers, logs. The trainer tells them; they never change what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl.result import Result
from cl.state import TrainState


class Observer:
    """Base of every observer: all events, each ignored.

    Events arrive in the order `on_start`, then for each experience `on_experience_start`, `on_step`s (with
    `on_within`s between), `on_evaluation`, and at last `on_end`, also after a failure or an interrupt. A resumed run
    begins with `on_start` too; `result.R` then already holds the rows of the experiences before.
    """

    def on_start(self, result: Result, settings: Mapping[str, Any]) -> None:
        """`settings`: every hyper-parameter of the run, flat, defaults included."""

    def on_experience_start(self, state: TrainState, num_steps: int) -> None:
        """`num_steps`: optimizer steps planned for this experience."""

    def on_step(self, state: TrainState, losses: Mapping[str, float], lr: float) -> None:
        """After each optimizer step. `losses`: "loss" (total) and each term by name, averaged over micro-batches."""

    def on_within(self, state: TrainState, values: Sequence[float]) -> None:
        """Measure on every domain, inside an experience."""

    def on_trace(self, state: TrainState, name: str, value: float) -> None:
        """What a strategy controls or measures, or a backbone tells of itself, at this optimizer step."""

    def on_evaluation(self, state: TrainState, result: Result) -> None:
        """A row of R is complete: `result.R[-1]`, after `len(result.R)` experiences."""

    def on_checkpoint(self, state: TrainState, path: str) -> None: ...

    def on_end(self, result: Result) -> None:
        """The run is over; `result` is final, `result.status` says how it ended."""
