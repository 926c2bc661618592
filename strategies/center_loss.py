"""Center loss: features of a class stay around one centre, which was learnt when the class was new.

    loss = CE + strength / 2 * mean over rows of |h(x) - c_y|^2      h(x): what the head reads
    c_j <- c_j - center_rate * (sum over rows of class j of (c_j - h(x))) / (1 + n_j)              every step

A centre moves only in the experience in which its class is first seen. Later experiences pull their features onto it,
and the head, which reads features that stay where they were, is kept.

Source: Olpadkar & Gavas, "Center Loss Regularization for Continual Learning", arXiv 2110.11314; the rule of the centres
is that of Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.
Differences: a centre starts at the mean of the first rows of its class. Rows of a class without a centre take no part
in the mean. Stored rows that another strategy adds to the batch are pulled too, as in the paper's form with replay.

Shape legend: B rows, C classes, F width of the last hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cl.core import Batch, Output, Setting, StreamInfo
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._backbone import in_float, require_backbone, require_own_weights
from strategies._checks import require, require_number


class CenterLoss(Strategy):
    """Pull features onto class centres that later experiences do not move.

    Args:
        strength: paper's lambda; 0 keeps no centres and leaves the head free.
        center_rate: paper's alpha; how fast a centre follows the features of its class while it is learnt.
        head_rate: share of each update that the head takes after the first experience: 0 freezes it, 1 leaves it free.

    Cost: no rows; C * F numbers.
    """

    settings = frozenset({Setting.DOMAIN_INCREMENTAL})
    contract = Contract(toy={"strength": 0.01}, zero={"strength": 0.0}, forgets_less_by=0.1)

    def __init__(self, strength: float = 0.1, center_rate: float = 0.5, head_rate: float = 0.0) -> None:
        require_number("center_loss.strength", strength)
        for name, rate in (("center_rate", center_rate), ("head_rate", head_rate)):
            require_number(f"center_loss.{name}", rate)
            require(rate <= 1, f"center_loss.{name}", rate, "between 0 and 1")
        self.strength, self.center_rate, self.head_rate = strength, center_rate, head_rate
        self.kept: dict[str, Tensor] = {}
        """`centers` (C, F), and `learnt_in` (C,): the experience in which each was learnt, -1 before."""

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        backbone = require_backbone(model, "center_loss", "a head over its features")
        if self.strength > 0 and self.head_rate < 1:
            require_own_weights(backbone.head, "center_loss")

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if not self.kept:
            return None
        has_center_B = self.kept["learnt_in"][batch.targets] >= 0
        if not has_center_B.any():
            return None
        apart_BF = in_float(output.features) - self.kept["centers"][batch.targets]
        return self.strength / 2 * apart_BF.square().sum(1)[has_center_B].mean()

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        if self.strength == 0 or self.head_rate == 1 or state.experience.id == 0:
            update()
            return
        head = list(require_backbone(state.model, "center_loss", "a head over its features").head.parameters())
        before = [p.detach().clone() for p in head]
        update()
        with torch.no_grad():
            # the update and not the gradient, so that momentum, weight decay and adaptive rates are held too
            for p, old in zip(head, before, strict=True):
                p.copy_(old if self.head_rate == 0 else torch.lerp(old, p, self.head_rate))

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.strength == 0:
            return
        hidden_BF = in_float(output.features)
        if not self.kept:
            centers = hidden_BF.new_zeros(state.info.num_outputs, hidden_BF.shape[1])
            self.kept = {"centers": centers, "learnt_in": torch.full_like(centers[:, 0], -1, dtype=torch.int64)}
        centers_CF, learnt_in_C = self.kept["centers"], self.kept["learnt_in"]
        for label in batch.targets.unique().tolist():
            rows_BF = hidden_BF[batch.targets == label]
            if learnt_in_C[label] < 0:
                learnt_in_C[label] = state.experience.id
                centers_CF[label] = rows_BF.mean(0)
            elif learnt_in_C[label] == state.experience.id:
                apart_F = (centers_CF[label] - rows_BF).sum(0)
                centers_CF[label] -= self.center_rate * apart_F / (1 + len(rows_BF))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.kept))

    def state_dict(self) -> dict[str, Any]:
        return dict(self.kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # copies, because both are written in place
        self.kept = {name: tensor.clone() for name, tensor in state.items()}
