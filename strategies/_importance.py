"""Importance of parameters, measured on rows of a finished experience: mean of a function of per-row gradients.

Shape legend: B rows, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._mixer import Mixer
from cl.buffers.base import draw_without_replacement
from cl.core import IGNORED, Batch, Output, Setting
from cl.state import TrainState
from strategies._checks import require_choice, require_count
from strategies._modes import evaluation_mode
from strategies._per_place import Function
from strategies._per_row import Loss, Rows, VectorisedSum, add_by_loop
from strategies._quadratic import Quadratic, Vectors

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

    def measured(
        self, state: TrainState, loss: Loss, function: Function, labels: str = "true", is_likelihood: bool = True
    ) -> Vectors:
        """Mean of `function` of gradients of `loss` over rows of the running experience, in evaluation mode."""
        num_rows, generator = len(state.data), state.seeds.named(self.name)
        index = draw_without_replacement(num_rows, self.importance_rows or num_rows, generator)
        group = self.batch_size if self.convention == "avalanche" else 1
        return mean_over_rows(state, index, loss, function, labels, generator, group, is_likelihood)

    @property
    def seals(self) -> str:
        return "" if self.strength == 0 else "added the importance of weights"

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch_size = state["batch_size"]


def mean_over_rows(
    state: TrainState,
    index: Tensor,
    loss: Loss,
    function: Function,
    labels: str = "true",
    generator: torch.Generator | None = None,
    group: int = 1,
    is_likelihood: bool = True,
) -> Vectors:
    """Mean of `function` of the gradient of each row's loss, over rows of the running experience.

    The square of the gradient of the cross-entropy gives the diagonal of the Fisher information.

    Args:
        index: (N,) rows of `state.data`.
        labels: see `_labels`; "sampled" draws from `generator`.
        group: take the gradient of the mean loss of so many rows in place of a row's.
        is_likelihood: the loss is that of a label. With `trainer.logit_mask=batch` it then leaves out the classes that
            none of these rows has, as training does; a mask for each row would leave nothing but its own class.

    Cost: N rows forward and backward, all in evaluation mode and counted.
    """
    total = {name: torch.zeros_like(p) for name, p in state.parameters().items()}
    vectorised = VectorisedSum(state, total) if group == 1 and _can_be_vectorised(state) else None
    present = _present(state, index) if state.masks_absent and is_likelihood else None
    with evaluation_mode(state.model):
        for some in index.split(max(1, ROWS_AT_A_TIME // group) * group):
            batch = state.prepare(state.data.rows(some))
            asked = Rows(batch, batch.targets, None, loss, function, present)
            for targets, factors in _labels(state, asked, labels, generator):
                rows = replace(asked, targets=targets, factors=factors)
                if vectorised is None:
                    add_by_loop(state, total, rows, group)
                else:
                    vectorised.add(rows)
    return {name: vector / math.ceil(len(index) / group) for name, vector in total.items()}


def _present(state: TrainState, index: Tensor) -> Tensor:
    """(heads, C) classes that some rows of the running experience have."""
    present = torch.zeros(state.info.num_heads, state.info.num_outputs, dtype=torch.bool)
    for some in index.split(ROWS_AT_A_TIME):
        rows = state.data.rows(some)
        present[0 if rows.task_id is None else rows.task_id, rows.targets] = True
    return present.to(state.device)


def _labels(
    state: TrainState, rows: Rows, labels: str, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Labels (B,) to take gradients for, and factors (B,) of the rows' losses, None for ones.

    "true": the data's. "sampled": one drawn from the model's own probabilities. "all": every class in turn, with the
    square root of its probability as factor, so that squared gradients add up to their exact expectation.
    """
    batch = rows.batch
    if labels == "true":
        yield batch.targets, None
        return
    with torch.no_grad():
        state.count(forwards=len(batch))
        probabilities_BC = rows.told(state.model(batch).logits, batch.task_id).softmax(-1)
    if labels == "sampled":
        # on the CPU, where the named generators live; tokens of text are drawn like rows
        flat = probabilities_BC.flatten(0, -2).cpu()
        drawn = torch.multinomial(flat, 1, generator=generator).view_as(batch.targets).to(state.device)
        yield torch.where(batch.targets == IGNORED, batch.targets, drawn), None
        return
    for label, probability_B in enumerate(probabilities_BC.unbind(1)):
        yield torch.full_like(batch.targets, label), probability_B.sqrt()


def _can_be_vectorised(state: TrainState) -> bool:
    """`vmap` has no rules for torch's recurrent layers: it would loop over rows too, and warn.

    Nor for what models of text and of sequences are made of (masks, caches, kernels); there a row has work enough by
    itself.
    """
    is_text = state.info.setting == Setting.CONTINUAL_PRETRAINING
    return not is_text and not any(isinstance(module, nn.RNNBase | Mixer) for module in state.model.modules())
