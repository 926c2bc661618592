"""Measure a model on held-out rows without leaving a trace: modes and random state are as found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones import Backbone
from cl.config import TrainerConfig
from cl.core import IGNORED, Batch, EvalSet, Output, Setting
from cl.hooks import Strategy, overrides
from cl.ledger import TOKEN_ACCURACY, Ledger
from cl.loader import tokens_per_row
from cl.shards import Sharded
from cl.state import TrainState

MAX_LOGITS = 1 << 26
"""Text is measured in smaller batches than asked for where its logits would not fit: 256 MiB in float32."""


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
    """Evaluation mode, no gradients, frozen random state; every module's own mode, and its shards, are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # shards are gathered into memory that training uses again, which must not be an inference tensor's
    guard = torch.no_grad() if isinstance(model, Sharded) else torch.inference_mode()
    try:
        with torch.random.fork_rng(), guard:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if isinstance(model, Sharded):
            # whole weights wait for a backward pass, and an optimizer made before it would be given these
            model.reshard()


def measure(
    state: TrainState,
    strategies: Sequence[Strategy],
    eval_set: EvalSet,
    batch_size: int,
    max_rows: int | None = None,
    extra: dict[str, float] | None = None,
) -> tuple[float, int]:
    """Accuracy in [0, 1], or mean loss in nats for streams that measure loss, over the rows of one domain.

    Args:
        max_rows: measure on the first rows only, always the same ones.
        extra: filled with what the set's own `score` finds beside the measure; for losses with the token accuracy, the
            share of next tokens that are the most likely one.

    Returns:
        the measure, and how many tokens the rows hold that it was taken on; one that is no text is one token.
    """
    data = eval_set.load()
    num_rows = min(len(data), max_rows or len(data))
    num_tokens = num_rows * data.rows(torch.arange(1)).targets.numel()  # rows of a set are of one length
    if state.info.setting == Setting.CONTINUAL_PRETRAINING:
        batch_size = max(1, min(batch_size, MAX_LOGITS // (state.info.num_outputs * tokens_per_row(state.info))))
    if eval_set.score is not None:
        found = eval_set.score(data, lambda rows: predict(state, strategies, state.prepare(rows)), num_rows, batch_size)
        (_, value), *others = found.items()
        if extra is not None:
            extra.update(others)
        return value, num_tokens
    is_loss = state.info.measure == "loss"
    total, right, count = torch.zeros((3,), dtype=torch.float64, device=state.device)
    for low in range(0, num_rows, batch_size):
        batch = state.prepare(data.rows(torch.arange(low, min(low + batch_size, num_rows))))
        logits = predict(state, strategies, batch).logits
        if is_loss:
            total += F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten(), reduction="sum")
        if not is_loss or extra is not None:
            right += (logits.argmax(-1) == batch.targets).sum()
        count += (batch.targets != IGNORED).sum()
    if is_loss and extra is not None:
        extra[TOKEN_ACCURACY] = float(right / count)
    return float((total if is_loss else right) / count), num_tokens


class Evaluator:
    """Fills the rows of R: which domains are measured when, charged and told.

    Args:
        strategies: of the run; the list is shared with the trainer.
    """

    def __init__(
        self, state: TrainState, config: TrainerConfig, ledger: Ledger, strategies: Sequence[Strategy]
    ) -> None:
        self.state, self.config, self.ledger, self.strategies = state, config, ledger, strategies
        ledger.follow(state)

    def row(self) -> list[float | None]:
        """The measure on every domain, or on those trained so far; None elsewhere."""
        every = range(len(self.state.stream.eval_sets))
        columns = every if self.config.evaluate == "all" else self._seen()
        row = self._measured(columns, self.config.eval_rows, self.ledger.result.extra)
        self._trace()
        self._inform(row, self.config.eval_rows)
        return row

    def within(self) -> None:
        """Measure the domains trained so far, and text that is never trained on, inside an experience."""
        self.ledger.flush(self.state)
        max_rows = self.config.within_eval_rows or self.config.eval_rows
        seen = self._seen()
        row = self._measured(sorted({*seen, *self._general()}), max_rows)
        self._trace()
        stage = self._stage()
        self.ledger.result.within += [[stage, self.state.step, j, v] for j, v in enumerate(row) if v is not None]
        self.ledger.tell("on_within", self.state, row)
        self._inform([value if j in seen else None for j, value in enumerate(row)], max_rows)

    def _trace(self) -> None:
        """Write down what backbones trace of themselves."""
        for backbone in self.state.model.modules():
            for name, value in backbone.traces().items() if isinstance(backbone, Backbone) else ():
                self.state.trace(name, float(value))

    def _inform(self, row: list[float | None], max_rows: int | None) -> None:
        """Tell the strategies; of what was measured before training they have no use."""
        if self.state.has_begun:
            for strategy in self.strategies:
                strategy.on_evaluation(self.state, row, max_rows)

    def _seen(self) -> Sequence[int]:
        count, result = self.state.experience.id + 1, self.ledger.result
        seen = {j for columns in result.practises[:count] for j in columns} or set(result.trained[:count])
        return range(len(self.state.stream.eval_sets)) if -1 in seen else sorted(seen)

    def _general(self) -> set[int]:
        """Columns of text that no experience teaches: what a model forgets of language itself."""
        result = self.ledger.result
        if result.measure != "loss" or -1 in result.trained:
            return set()
        return set(range(len(result.domains))) - {*result.trained, *(j for row in result.practises for j in row)}

    def _stage(self) -> int:
        """The row of R that is being made; -1 before training."""
        return len(self.ledger.result.R) if self.state.has_begun else -1

    def _measured(
        self, columns: Sequence[int], max_rows: int | None, extra: list[list[Any]] | None = None
    ) -> list[float | None]:
        row: list[float | None] = [None] * len(self.state.stream.eval_sets)
        self.ledger.mark(self.state)
        predictors = [strategy for strategy in self.strategies if overrides(strategy, "eval_forward")]
        with self.ledger.charged("eval_s"), evaluating(self.state.model):
            for j in columns:
                eval_set = self.state.stream.eval_sets[j]
                beside: dict[str, float] = {}
                size = self.config.eval_batch_size
                row[j], num_tokens = measure(
                    self.state, predictors, eval_set, size, max_rows, None if extra is None else beside
                )
                self.ledger.clock["eval_tokens"] += num_tokens
                if extra is not None:
                    extra += [[name, self._stage(), j, value] for name, value in beside.items()]
        return row
