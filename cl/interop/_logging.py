"""Our metrics as a metric of Avalanche, and our trackers as a logger."""

from __future__ import annotations

import atexit
import math
import time
from types import SimpleNamespace
from typing import Any

from cl.interop._quiet import quiet, require_avalanche
from cl.metrics import EvalTable, summary
from cl.result import Result, environment
from cl.tracking import MLflowTracker, Point
from cl.tracking.base import Recorder
from cl.tracking.points import legal_name

require_avalanche()
with quiet():
    from avalanche.evaluation import PluginMetric
    from avalanche.evaluation.metric_results import MetricValue
    from avalanche.logging import BaseLogger

THEIR_SECTION = "avalanche/"
"""Where Avalanche's own metrics go; their step is Avalanche's, the count of iterations."""


class Matrix:
    """Collects R from what is measured after each experience, whatever the template is.

    A stream that is measured before training fills `R_init`. An experience teaches the domain of its number, or the
    only one there is.
    """

    def __init__(self) -> None:
        self.R: list[list[float | None]] = []
        self.R_init: list[float | None] | None = None
        self.trained: list[int] = []
        self._row: dict[int, float] = {}
        self._counts = [0, 0]

    def after_eval_iteration(self, template: Any) -> None:
        self._counts[0] += int((template.mb_output.argmax(-1) == template.mb_y).sum())
        self._counts[1] += len(template.mb_y)

    def after_eval_exp(self, template: Any) -> None:
        right, rows = self._counts
        self._row[template.experience.current_experience] = right / rows if rows else math.nan
        self._counts = [0, 0]

    def after_training_exp(self, template: Any) -> None:
        self.trained.append(template.experience.current_experience)

    def after_eval(self) -> int:
        """Put the row where it belongs; returns how many experiences are behind."""
        width = max([*self._row, *(len(row) - 1 for row in self.R)]) + 1
        row: list[float | None] = [self._row.get(j) for j in range(width)]
        self._row = {}
        if not self.trained:
            self.R_init = row
        else:
            # measured twice after one experience: the later one counts
            self.R[len(self.trained) - 1 :] = [row]
        return len(self.R)

    def table(self) -> EvalTable:
        width = len(self.R[-1])
        R_init = self.R_init if self.R_init and len(self.R_init) == width else None
        return EvalTable.from_rows(self.R, R_init, trained=self.taught(width))

    def taught(self, width: int) -> list[int]:
        """Domain of each experience: its own number, the only one, or none (-1)."""
        return [k if k < width else 0 if width == 1 else -1 for k in self.trained[: len(self.R)]]


class ContinualMetrics(PluginMetric):
    """Everything that `cl.metrics` says of R, after each evaluation: final, average, BWT, FWT, forgetting and so on.

    Measure the whole test stream after every experience: `for e in train: strategy.train(e); strategy.eval(test)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrix = Matrix()

    def result(self) -> dict[str, float]:
        return summary(self.matrix.table()) if self.matrix.R else {}

    def reset(self) -> None:
        self.matrix = Matrix()

    def after_eval_iteration(self, strategy: Any) -> None:
        self.matrix.after_eval_iteration(strategy)

    def after_eval_exp(self, strategy: Any) -> None:
        self.matrix.after_eval_exp(strategy)

    def after_training_exp(self, strategy: Any) -> None:
        self.matrix.after_training_exp(strategy)

    def after_eval(self, strategy: Any) -> list[MetricValue]:
        self.matrix.after_eval()
        return [
            MetricValue(self, f"cl/{name}", value, strategy.clock.train_iterations)
            for name, value in self.result().items()
        ]

    def __str__(self) -> str:
        return "cl"


class TrackerLogger(BaseLogger):
    """A tracker of ours as a logger of Avalanche: the same names and steps as in a run of ours.

    Loss and learning rate go to `train/`, rows of R to `accuracy/` and what follows from them to `forgetting/` and
    `summary/`, all other metrics to `avalanche/`.

    Args:
        tracker: such as `MLflowTracker`, `Journal` or `Memory`.
        stream, name, seed: what the run is called.
        settings: hyper-parameters to log.
    """

    def __init__(
        self,
        tracker: Recorder,
        *,
        stream: str = "avalanche",
        name: str | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tracker, self.settings = tracker, dict(settings or {})
        self.matrix = Matrix()
        self.result: Result | None = None
        self._stream, self._name, self._seed = stream, name, seed
        self._steps, self._lr = 0, 0.0
        self._waiting: list[tuple[Point, float]] = []
        self._began = time.perf_counter()
        atexit.register(self.close)

    def __enter__(self) -> TrackerLogger:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # what Avalanche calls

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self._waiting.append((Point(legal_name(THEIR_SECTION + name), float(value), x_plot), time.time()))

    def before_training(self, strategy: Any, metrics: Any = None) -> None:
        if self.result is None:
            self._open(strategy)

    def before_training_exp(self, strategy: Any, metrics: Any = None) -> None:
        self.tracker.on_experience_start(SimpleNamespace(step=self._steps), 0)  # type: ignore[arg-type]

    def after_training_iteration(self, strategy: Any, metrics: Any = None) -> None:
        self._steps += 1
        self._lr = strategy.optimizer.param_groups[0]["lr"] if strategy.optimizer else 0.0
        losses = {"loss": float(strategy.loss.detach().sum())}
        self.tracker.on_step(SimpleNamespace(step=self._steps), losses, self._lr)  # type: ignore[arg-type]

    def after_training_exp(self, strategy: Any, metrics: Any = None) -> None:
        self.matrix.after_training_exp(strategy)

    def after_eval_iteration(self, strategy: Any, metrics: Any = None) -> None:
        self.matrix.after_eval_iteration(strategy)

    def after_eval_exp(self, strategy: Any, metrics: Any = None) -> None:
        self.matrix.after_eval_exp(strategy)

    def after_eval(self, strategy: Any, metrics: Any = None) -> None:
        if self.result is None:
            self._open(strategy)
        stage = self.matrix.after_eval()
        self._update()
        if stage:
            self.tracker.on_evaluation(SimpleNamespace(step=self._steps), self.result)  # type: ignore[arg-type]
        self._flush()

    def close(self) -> None:
        """The run is over; called at the end of the process when it was not called before."""
        atexit.unregister(self.close)
        if self.result is None or self.result.status == "done":
            return
        self._update()
        self.result.status = "done"
        self._flush()
        self.tracker.on_end(self.result)

    # inside

    def _open(self, strategy: Any) -> None:
        self.result = Result(
            stream=self._stream,
            strategy=[self._name or type(strategy).__name__],
            backbone=type(strategy.model).__name__.lower(),
            setting="",
            seed=self._seed,
            experiences=[],
            domains=[],
            trained=[],
            measure="accuracy",
            env=environment(),
        )
        self.tracker.on_start(self.result, self.settings | {"seed": self._seed})

    def _update(self) -> None:
        result, matrix = self.result, self.matrix
        if result is None or not matrix.R:
            return
        width = len(matrix.R[-1])
        result.R, result.R_init = matrix.R, matrix.R_init or [None] * width
        result.trained = matrix.taught(width)
        result.experiences = [f"experience {k}" for k in matrix.trained[: len(matrix.R)]]
        result.domains = [f"experience {j}" for j in range(width)]
        result.metrics = {**summary(matrix.table())}
        result.cost = {"updates": self._steps, "wall_s": time.perf_counter() - self._began}

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and not self.tracker.is_silent:
            # guarded by the tracker: a store that is lost must not end the training
            self.tracker._guard(self.tracker.write, waiting)


class MLflowLogger(TrackerLogger):
    """Avalanche's missing MLflow logger: `EvaluationPlugin(..., loggers=[MLflowLogger()])`.

    Args:
        uri: any tracking address; None takes the embedded store of the working directory, which `cl ui` opens.
        experiment: name of the MLflow experiment; the stream's name when None.
        who: as for `TrackerLogger`.
    """

    def __init__(self, uri: str | None = None, experiment: str | None = None, **who: Any) -> None:
        super().__init__(MLflowTracker(uri, experiment=experiment), **who)
