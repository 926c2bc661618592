"""Importance of parameters, measured on rows of a finished experience: mean of a function of per-row gradients.

Shape legend: B rows, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Output
from cl.state import TrainState
from strategies._checks import require_choice, require_count
from strategies._modes import evaluation_mode
from strategies._quadratic import Quadratic, Vectors

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), targets (B,)) -> mean over rows."""
Function = Callable[[Tensor], Tensor]

MAX_NUMBERS = 1 << 21
"""Numbers held at once in per-row gradients: they are read again at once, so they should still be in the cache."""
ROWS_AT_A_TIME = 256


class DataImportance(Quadratic):
    """A quadratic penalty whose importance is measured on data.

    Args:
        importance_rows: rows of an experience it is measured on, drawn at random; None takes all of them.
        convention: "per_row" averages a function of the gradient of each row; "avalanche" of the gradient of each
            batch's mean loss, as Avalanche does, so that importance shrinks as the batch grows.
    """

    def __init__(self, strength: float, importance_rows: int | None, convention: str) -> None:
        super().__init__(strength)
        require_count(f"{self.name}.importance_rows", importance_rows, none_means="all rows")
        require_choice(f"{self.name}.convention", convention, ("per_row", "avalanche"))
        self.importance_rows, self.convention = importance_rows, convention
        self.batch_size = 1

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        self.batch_size = max(self.batch_size, len(batch))

    def measured(self, state: TrainState, loss: Loss, function: Function, labels: str = "true") -> Vectors:
        """Mean of `function` of gradients of `loss` over rows of the running experience, in evaluation mode."""
        num_rows, generator = len(state.data), state.seeds.named(self.name)
        index = draw_without_replacement(num_rows, self.importance_rows or num_rows, generator)
        group = self.batch_size if self.convention == "avalanche" else 1
        add = _add_by_vmap if group == 1 and _can_be_vectorised(state.model) else _add_by_loop
        total = {name: torch.zeros_like(p) for name, p in state.parameters().items()}
        with evaluation_mode(state.model):
            for some in index.split(max(1, ROWS_AT_A_TIME // group) * group):
                batch = state.prepare(state.data.rows(some))
                for targets, factors in _labels(state, batch, labels, generator):
                    state.count(len(batch), len(batch))
                    add(total, state, batch, targets, factors, loss, function, group)
        return {name: vector / math.ceil(len(index) / group) for name, vector in total.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch_size = state["batch_size"]


def _labels(
    state: TrainState, batch: Batch, labels: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (B,) to take gradients for, and factors (B,) of the rows' losses.

    "true": the data's. "sampled": one drawn from the model's own probabilities. "all": every class in turn, with the
    square root of its probability as factor, so that squared gradients add up to their exact expectation.
    """
    ones = torch.ones(len(batch), device=state.device)
    if labels == "true":
        yield batch.targets, ones
        return
    with torch.no_grad():
        state.count(forwards=len(batch))
        probabilities_BC = state.model(batch).logits.softmax(-1)
    if labels == "sampled":
        # on the CPU, where the named generators live
        drawn = torch.multinomial(probabilities_BC.cpu(), 1, generator=generator).squeeze(1)
        yield drawn.to(state.device), ones
        return
    for label, probability_B in enumerate(probabilities_BC.unbind(1)):
        yield torch.full_like(batch.targets, label), probability_B.sqrt()


def _add_by_vmap(
    total: Vectors,
    state: TrainState,
    batch: Batch,
    targets: Tensor,
    factors: Tensor,
    loss: Loss,
    function: Function,
    group: int,
) -> None:
    """Add `function` of each row's gradient, many rows at once."""
    parameters = {name: p.detach() for name, p in state.parameters().items()}
    size = max(1, MAX_NUMBERS // sum(p.numel() for p in parameters.values()))
    for rows, task_id in _rows_by_task(batch):

        def row_loss(parameters: Vectors, x: Tensor, y: Tensor, factor: Tensor, task_id: Any = task_id) -> Tensor:
            row = Batch(x[None], y[None], batch.experience_id[:1], batch.sample_ids[:1], task_id)
            logits = functional_call(state.model, parameters, (row,)).logits
            return factor * loss(logits, y[None])

        gradients = vmap(grad(row_loss), in_dims=(None, 0, 0, 0))
        for some in rows.split(size):
            for name, g in gradients(parameters, batch.inputs[some], targets[some], factors[some]).items():
                total[name] += function(g).sum(0)


def _rows_by_task(batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Row numbers of each head: which head a row takes cannot differ within a vectorised call."""
    if batch.task_id is None:
        yield torch.arange(len(batch), device=batch.inputs.device), None
        return
    for task in batch.task_id.unique():
        yield (batch.task_id == task).nonzero().squeeze(1), task[None]


def _add_by_loop(
    total: Vectors,
    state: TrainState,
    batch: Batch,
    targets: Tensor,
    factors: Tensor,
    loss: Loss,
    function: Function,
    group: int,
) -> None:
    """Add `function` of the gradient of the mean loss of each `group` rows."""
    parameters = state.parameters()
    # cuDNN has no backward pass of recurrent layers in evaluation mode
    with torch.backends.cudnn.flags(enabled=False):
        for some in torch.arange(len(batch), device=batch.inputs.device).split(group):
            value = (factors[some] * loss(state.model(batch[some]).logits, targets[some])).mean()
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    total[name] += function(g)


def _can_be_vectorised(model: nn.Module) -> bool:
    """`vmap` has no rules for torch's recurrent layers: it would loop over rows too, and warn."""
    return not any(isinstance(module, nn.RNNBase) for module in model.modules())
