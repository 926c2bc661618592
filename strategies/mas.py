"""Memory aware synapses: hold parameters by how much the outputs react to them; needs no labels.

    penalty = strength * sum_i Omega_i (theta_i - theta_last,i)^2
    Omega_i = sum over past experiences of the mean over rows of | d |f(x)|^2 / d theta_i |

Source: Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget", ECCV 2018.
Differences: `convention="avalanche"` is training/plugins/mas.py: the gradient of the batch's mean, and
Omega <- mix * Omega + (1 - mix) * new in place of the sum. f(x) are all outputs, also under `trainer.logit_mask=batch`:
they are what the method holds, and not a likelihood.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl.core import IGNORED, Setting
from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require, require_number
from strategies._importance import DataImportance
from strategies._quadratic import snapshot


class Mas(DataImportance):
    """Hold parameters by the sensitivity of the outputs.

    Args:
        strength: paper's lambda; 0 measures nothing.
        importance_rows: rows of each experience that the sensitivity is measured on; None takes all of them.
        convention: "per_row" is the definition above; "avalanche" is described there.
        mix: weight of the old importance in the avalanche convention.

    Cost: no rows per step; at the end of an experience importance_rows rows forward and backward.
    """

    parallel = frozenset({"ddp"})
    settings = frozenset(Setting)
    contract = Contract(toy={"strength": 0.1}, zero={"strength": 0.0}, forgets_less_by=0.1)

    def __init__(
        self,
        strength: float = 0.01,
        importance_rows: int | None = 1000,
        convention: str = "per_row",
        mix: float = 0.5,
    ) -> None:
        super().__init__(strength, importance_rows, convention)
        require_number("mas.mix", mix)
        require(mix < 1, "mas.mix", mix, "below 1")
        self.mix = mix

    def on_experience_end(self, state: TrainState) -> None:
        if self.strength == 0:
            return
        importance = self.measured(state, squared_length, torch.abs, is_likelihood=False)
        for name, old in self.importance.items():
            new = importance[name]
            importance[name] = old + new if self.convention == "per_row" else self.mix * old + (1 - self.mix) * new
        self.importance, self.anchor = importance, snapshot(state)


def squared_length(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Mean over rows, and over the tokens of text that are asked for, of the squared length of the outputs."""
    lengths_B = logits_BC.square().sum(-1)
    if targets_B.dim() < 2:
        return lengths_B.mean()
    is_asked_BT = targets_B != IGNORED
    return (lengths_B * is_asked_BT).sum() / is_asked_BT.sum().clamp(min=1)
