"""Measure a model on held-out rows without leaving a trace: modes and random state are as found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from cl.core import Batch, EvalSet, Output
from cl.hooks import Strategy
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


def measure_all(
    state: TrainState,
    strategies: Sequence[Strategy],
    columns: Sequence[int],
    batch_size: int,
    max_rows: int | None = None,
) -> tuple[list[float | None], int]:
    """A row of R: the measure on each eval set in `columns`, None elsewhere; and the number of rows it took."""
    row: list[float | None] = [None] * len(state.stream.eval_sets)
    rows_measured = 0
    with evaluating(state.model):
        for j in columns:
            row[j], num_rows = measure(state, strategies, state.stream.eval_sets[j], batch_size, max_rows)
            rows_measured += num_rows
    return row, rows_measured
