"""What every tracker does with the events of a run, and the simplest one: a list in memory."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from cl.core import UserError
from cl.observe import Observer
from cl.result import Result
from cl.tracking.points import (
    Point,
    defined,
    is_settled,
    last_points,
    points,
    trace_point,
    train_points,
    within_points,
    within_token_points,
)

if TYPE_CHECKING:
    from cl.state import TrainState

EVERY_STEPS = 100
FLUSH_EVERY_S = 10.0

Stamped = tuple[Point, float]
"""A point and when it was made, in seconds since 1970."""

_logger = logging.getLogger(__name__)


class Recorder(Observer):
    """Base of every tracker: events become points, training points are thinned, and points are written in batches.

    A tracker never stops a run: the first error of `rewind` or `write` is told in one warning, and nothing more is
    written. Steps are counted here, not read from the state, which may be ahead of the losses that are told.

    Args:
        every_steps: optimizer steps between two points under `train/`; each is the mean of the losses since the last.
            An experience always ends with one.
        flush_every_s: points wait in memory at most this long, and as a rule until the experience ends.

    Class attributes:
        rest_s: the end of an experience writes nothing when the last writing is less than this ago.
    """

    rest_s: ClassVar[float] = 0.0
    _result: Result | None
    _waiting: list[Stamped]

    def __init__(self, every_steps: int = EVERY_STEPS, flush_every_s: float = FLUSH_EVERY_S) -> None:
        if type(every_steps) is not int or every_steps < 1:
            raise UserError(f"tracking.every_steps is {every_steps!r}; it must be an integer of at least 1")
        self.every_steps, self.flush_every_s = every_steps, flush_every_s
        self.is_silent = False
        self._reset()

    # for subclasses

    def open(self, result: Result, settings: Mapping[str, Any]) -> None:
        """The run starts, or goes on."""

    def rewind(self, steps: int | None, experiences: int) -> set[tuple[str, int]]:
        """Forget what lies beyond where the run goes on.

        Args:
            steps: optimizer steps that are behind the run, 0 for a fresh one; None when nothing is left to train.

        Returns:
            (name, step) of the points that need no second writing.
        """
        return set()

    def write(self, batch: Sequence[Stamped]) -> None:
        """Write points; called with at least one."""
        raise NotImplementedError

    def close(self, result: Result) -> None:
        """The run is over and every point is written."""

    def lost(self, error: Exception) -> str:
        """The sentence that says what the run goes on without."""
        return f"{type(self).__name__} cannot write ({first_line(error)}); the run goes on without it"

    # events

    def on_start(self, result: Result, settings: Mapping[str, Any]) -> None:
        self._reset()
        self._result = result
        self._guard(self.open, result, settings)

    def on_experience_start(self, state: TrainState, num_steps: int) -> None:
        if not self._has_begun:
            self._step = state.step
            self._begin(state.step)

    def on_step(self, state: TrainState, losses: Mapping[str, float], lr: float) -> None:
        self._step += 1
        self._num_summed += 1
        sums = self._sums
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
        if self._step % self.every_steps == 0:
            self._take_train(lr)
        else:
            self._lr = lr

    def on_within(self, state: TrainState, values: Sequence[float | None]) -> None:
        self._take(within_points(values, self._step))
        if self._result is not None and self._result.course:
            _, _, tokens, lr = self._result.course[-1]
            self._take(within_token_points(values, int(tokens), lr))

    def on_trace(self, state: TrainState, name: str, value: float) -> None:
        # what is told before the run stands somewhere is in its result, which is read then
        if self._has_begun:
            self._take(defined([trace_point(name, value, state.step)]))

    def on_evaluation(self, state: TrainState, result: Result) -> None:
        self._take_train(self._lr)
        self._take(self._guard(points, result, len(result.R) - 1) or ())
        self._flush_after(self.rest_s)

    def on_end(self, result: Result) -> None:
        is_done = result.status == "done"
        if is_done and not self._has_begun:
            self._begin(None)
        self._take_train(self._lr)
        if is_done:
            self._take(last_points(result))
        self.flush()
        self._guard(self.close, result)

    def flush(self) -> None:
        """Write what waits."""
        batch, self._waiting = self._waiting, []
        self._flushed_at = time.monotonic()
        if batch:
            self._guard(self.write, batch)

    # inside

    def _reset(self) -> None:
        self._result = None
        self._has_begun = False
        self._step, self._num_summed, self._lr = 0, 0, 0.0
        self._sums: dict[str, float] = {}
        self._known: set[tuple[str, int]] = set()
        self._waiting = []
        self._flushed_at = time.monotonic()

    def _begin(self, steps: int | None) -> None:
        """Where the run goes on is known only now: in the middle of an experience, after one, or nowhere."""
        assert self._result is not None, "on_start comes first"
        self._has_begun = True
        self._known = self._guard(self.rewind, steps, len(self._result.R)) or set()
        if self._result.domains:  # a hosted run may not know them yet
            # nobody told what was measured before training, nor the row of an experience that ended just before a crash
            self._take(self._guard(points, self._result) or ())

    def _take(self, found: Iterable[Point]) -> None:
        if self.is_silent:
            return
        now = time.time()
        for point in found:
            key = (point.name, point.step)
            if key not in self._known:
                self._known.add(key)
                self._waiting.append((point, now))
        self._flush_after(self.flush_every_s)

    def _flush_after(self, seconds: float) -> None:
        if time.monotonic() - self._flushed_at >= seconds:
            self.flush()

    def _take_train(self, lr: float) -> None:
        if self._num_summed:
            means = {name: total / self._num_summed for name, total in self._sums.items()}
            self._num_summed, self._sums = 0, {}
            self._take(train_points(means, lr, self._step))

    def _guard(self, action: Any, *details: Any) -> Any:
        """Do it, unless something failed before; a failure is told once and never reaches the run."""
        if self.is_silent:
            return None
        try:
            return action(*details)
        except Exception as error:  # a store fails in every way there is; the run must outlive them all
            self.is_silent = True
            self._waiting = []
            _logger.warning("%s", self.lost(error))
            return None


class Memory(Recorder):
    """Points in a list: for tests, notebooks and machines without any tracker.

    Example:
        >>> memory = Memory()
        >>> memory.write([(Point("summary/bwt", -0.5, 2), 0.0)])
        >>> memory.curve("summary/bwt")
        [(2, -0.5)]
    """

    def __init__(self, every_steps: int = EVERY_STEPS) -> None:
        super().__init__(every_steps, flush_every_s=0.0)
        self.points: list[Point] = []

    def rewind(self, steps: int | None, experiences: int) -> set[tuple[str, int]]:
        self.points = [p for p in self.points if steps != 0 and is_settled(p, steps, experiences)]
        return {(p.name, p.step) for p in self.points}

    def write(self, batch: Sequence[Stamped]) -> None:
        self.points += [point for point, _ in batch]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one name, in the order written."""
        return [(p.step, p.value) for p in self.points if p.name == name]


def first_line(error: BaseException) -> str:
    """What an error says, fit for one sentence; of a failed connection or file, what the system or SQLite said."""
    cause: BaseException | None = error
    while cause is not None:
        is_of_system = isinstance(cause, OSError) and (cause.errno is not None or isinstance(cause, TimeoutError))
        if is_of_system or isinstance(cause, sqlite3.Error):
            error = cause
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
