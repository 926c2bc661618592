"""Measure a model on held-out rows without leaving a trace: modes and random state are as found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from cl.config import TrainerConfig
from cl.core import Batch, EvalSet, Output
from cl.hooks import Strategy, overrides
from cl.ledger import Ledger
from cl.state import TrainState


def predict(state: TrainState, strategies: Sequence[Strategy], batch: Batch) -> Output:
    """The first strategy with an answer of its own predicts; otherwise the model does."""
    for strategy in strategies:
        output = strategy.eval_forward(state, batch)
        if output is not None:
            return output
    with state.autocast():
        return state.model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, frozen random state; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def measure(
    state: TrainState, strategies: Sequence[Strategy], eval_set: EvalSet, batch_size: int, max_rows: int | None = None
) -> tuple[float, int]:
    """Accuracy in [0, 1], or mean loss in nats for streams that measure loss, over the rows of one domain.

    Args:
        max_rows: measure on the first rows only, always the same ones.

    Returns:
        the measure, and how many rows it was taken on.
    """
    data = eval_set.load()
    num_rows = min(len(data), max_rows or len(data))
    is_loss = state.info.measure == "loss"
    total, count = torch.zeros((), dtype=torch.float64, device=state.device), 0
    for low in range(0, num_rows, batch_size):
        batch = state.prepare(data.rows(torch.arange(low, min(low + batch_size, num_rows))))
        logits = predict(state, strategies, batch).logits
        if is_loss:
            total += F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten(), reduction="sum")
        else:
            total += (logits.argmax(-1) == batch.targets).sum()
        count += batch.targets.numel()
    return total.item() / count, num_rows


class Evaluator:
    """Fills the rows of R: which domains are measured when, charged and told.

    Args:
        strategies: of the run; the list is shared with the trainer.
    """

    def __init__(
        self, state: TrainState, config: TrainerConfig, ledger: Ledger, strategies: Sequence[Strategy]
    ) -> None:
        self.state, self.config, self.ledger, self.strategies = state, config, ledger, strategies

    def row(self) -> list[float | None]:
        """The measure on every domain, or on those trained so far; None elsewhere."""
        every = range(len(self.state.stream.eval_sets))
        return self._measured(every if self.config.evaluate == "all" else self._seen(), self.config.eval_rows)

    def within(self) -> None:
        """Measure the domains trained so far, inside an experience."""
        self.ledger.flush(self.state)
        row = self._measured(self._seen(), self.config.within_eval_rows or self.config.eval_rows)
        stage = len(self.ledger.result.R)
        self.ledger.result.within += [[stage, self.state.step, j, v] for j, v in enumerate(row) if v is not None]
        self.ledger.tell("on_within", self.state, row)

    def _seen(self) -> Sequence[int]:
        experience, trained = self.state.experience, self.ledger.result.trained
        seen = set(trained[: experience.id + 1]) if experience else set()
        return range(len(self.state.stream.eval_sets)) if -1 in seen else sorted(seen)

    def _measured(self, columns: Sequence[int], max_rows: int | None) -> list[float | None]:
        row: list[float | None] = [None] * len(self.state.stream.eval_sets)
        predictors = [strategy for strategy in self.strategies if overrides(strategy, "eval_forward")]
        with self.ledger.charged("eval_s"), evaluating(self.state.model):
            for j in columns:
                eval_set = self.state.stream.eval_sets[j]
                row[j], num_rows = measure(self.state, predictors, eval_set, self.config.eval_batch_size, max_rows)
                self.ledger.clock["eval_rows"] += num_rows
        return row
