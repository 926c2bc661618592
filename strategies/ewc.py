"""Elastic weight consolidation: stay near old solutions where the Fisher information of their data is large.

    penalty = strength / 2 * sum_{j < t} sum_i F_ji (theta_i - theta_ji)^2              (mode="offline")
    penalty = strength / 2 * sum_i F_i (theta_i - theta_last,i)^2,  F <- gamma F + F_t  (mode="online")

    F_t,i = mean over rows of (d log p(y | x) / d theta_i)^2 at the end of experience t

The offline sum is kept as one importance, one importance-weighted mean anchor and a constant, which is the same
function of theta: a sum of parabolas is a parabola. So it needs the memory of two networks and the time of one term,
however many experiences there were.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (offline); Schwarz et
al., "Progress & Compress", ICML 2018 (online, one last anchor). Labels and conventions as in van de Ven
(GMvandeVen/continual-learning) and Avalanche (training/plugins/ewc.py); a strength means nothing without them.
Differences: in the penalty of online EWC the paper and van de Ven multiply F by gamma once more, which is a strength of
gamma times ours.
Text: a row is a row of tokens and log p(y | x) the mean over them, as in the training loss. Were the gradients of T
tokens independent, this F would be the Fisher information of a token divided by T.
Masks: with `trainer.logit_mask=batch` p is shared out among the classes that the measured rows have, as in training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cl.core import Setting, Stream
from cl.hooks import Contract
from cl.state import TrainState, mean_cross_entropy
from strategies._checks import require, require_choice, require_number
from strategies._importance import DataImportance
from strategies._per_row import Loss
from strategies._quadratic import Vectors, snapshot


class Ewc(DataImportance):
    """Hold parameters by their Fisher information.

    Args:
        strength: paper's lambda; 0 measures nothing. The default comes from permuted MNIST with SGD at 0.1, where 100
            and more diverge; tune it on a validation stream (`stream.eval_on=validation`).
        mode: "offline" keeps one term per past experience, "online" a running Fisher and the last solution.
        gamma: how much of the running Fisher an experience leaves; online only.
        labels: of the gradients. "true" is the empirical Fisher; "sampled" draws them from the model's predictions;
            "all" takes the exact expectation over them, at C times the cost; not for text.
        importance_rows: rows of each experience that the Fisher is measured on; None takes all of them.
        convention: "per_row" is the definition above; "avalanche" squares the gradient of every batch's mean loss
            and leaves out the factor 1/2, so that its strength is larger by about the batch size.

    Cost: no rows per step; at the end of an experience importance_rows rows forward and backward.
    """

    settings = frozenset(Setting)
    parallel = frozenset({"ddp"})
    contract = Contract(toy={"strength": 20.0}, zero={"strength": 0.0}, forgets_less_by=0.03)

    def __init__(
        self,
        strength: float = 10.0,
        mode: str = "offline",
        gamma: float = 1.0,
        labels: str = "true",
        importance_rows: int | None = 1000,
        convention: str = "per_row",
    ) -> None:
        super().__init__(strength, importance_rows, convention)
        require_choice("ewc.mode", mode, ("offline", "online"))
        require_number("ewc.gamma", gamma)
        require(gamma <= 1, "ewc.gamma", gamma, "at most 1")
        require(gamma == 1 or mode == "online", "ewc.gamma", gamma, "1 unless ewc.mode is online")
        require_choice("ewc.labels", labels, ("true", "sampled", "all"))
        require(
            labels == "true" or convention == "per_row", "ewc.labels", labels, "true when ewc.convention is avalanche"
        )
        self.mode, self.gamma, self.labels = mode, gamma, labels

    def check(self, stream: Stream) -> None:
        super().check(stream)
        is_text = stream.info.setting == Setting.CONTINUAL_PRETRAINING
        require(self.labels != "all" or not is_text, "ewc.labels", self.labels, "true or sampled on text")

    @property
    def factor(self) -> float:
        return self.strength / 2 if self.convention == "per_row" else self.strength

    def on_experience_end(self, state: TrainState) -> None:
        if self.strength == 0:
            return
        fisher, solution = self.measured(state, _loss_of(state), torch.square, self.labels), snapshot(state)
        if self.mode == "offline":
            self._add_parabola(fisher, solution)
            return
        for name, running in self.importance.items():
            fisher[name] += self.gamma * running
        self.importance, self.anchor = fisher, solution

    def _add_parabola(self, fisher: Vectors, solution: Vectors) -> None:
        """Complete the square: with w = f / (a + f) and m' = m + w (s - m),

        a (x - m)^2 + f (x - s)^2 = (a + f) (x - m')^2 + w a (s - m)^2
        """
        for name, f in fisher.items():
            if name not in self.importance:
                self.importance[name], self.anchor[name] = f, solution[name]
                continue
            a, both = self.importance[name], self.importance[name] + f
            share = torch.where(both > 0, f / both, 1.0)
            apart = solution[name] - self.anchor[name]
            self.offset += torch.sum(share * a * apart.square(), dtype=torch.float64).item()
            self.anchor[name] += share * apart
            self.importance[name] = both


def _loss_of(state: TrainState) -> Loss:
    """Cross-entropy of rows, or of their tokens."""
    return mean_cross_entropy if state.info.setting == Setting.CONTINUAL_PRETRAINING else F.cross_entropy
