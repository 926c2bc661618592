"""Refresh learning: before each step, unlearn its batch a little, so that what is learnt anew lies in a flatter place.

For j = 1 .. num_unlearn, per parameter tensor theta_l, before the forward pass of the step:

    theta_l <- theta_l + delta (v_l + noise eps) / (1 + damping F_l),  v_l = |theta_l| g_l / |g_l|     (mode="official")
    theta   <- theta + gamma g / (F + damping) + noise sqrt(2 gamma / (F + damping)) eps               (mode="paper")

    eps ~ N(0, 1);  F <- decay F + mean over rows of w g_i^2 at the end of every experience

    official: g = gradient of CE(current rows),    w = p(y_i | x_i)
    paper:    g = gradient of the whole loss,      w = 1, the diagonal of the empirical Fisher information

g_i is the gradient of one row's log p(y_i | x_i). Before the first experience has ended there is no F, and 0 stands for
it: the displacement is then neither damped nor preconditioned (with the paper mode's default damping of 1). The whole
loss is what the step would minimise: labels, replayed rows and penalties of every strategy before this one.

Source: Wang et al., "A Unified and General Framework for Continual Learning", ICLR 2024; mode "official" is its code,
joey-wang123/CL-refresh-learning models/derpp.py, mode "paper" its equations.
Differences between the two: the paper ascends the whole loss, the code the cross-entropy of the current rows; the
paper's step is preconditioned Langevin dynamics, the code's has the same relative length in every tensor and noise that
is a thousand times smaller than the drift; the code weighs the Fisher information by p, and with its decay of 1e-5
keeps that of the last experience only. The code also trains with a weight decay of 1e-4 that its baseline lacks; give
`optimizer.weight_decay` to both.
Differences from the code: its Fisher information is taken in training mode, ours in evaluation mode, and under
`trainer.logit_mask=batch` over the classes that the measured rows have. Parameters without a gradient (heads of other
tasks) stay as they are; the code would move them by their noise. Under gradient accumulation the rows of the first
micro-batch are unlearnt, once per step, so that all micro-batches see the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Stream, UserError
from cl.hooks import Contract, Strategy, overrides
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_choice, require_count, require_number
from strategies._importance import mean_over_rows
from strategies._modes import buffers_kept
from strategies._quadratic import Vectors, copied

DAMPING = {"official": 1e-3, "paper": 1.0}
NOISE = {"official": 1e-3, "paper": 1.0}


class Refresh(Strategy):
    """Unlearn before learning; put it last, behind what it refreshes: `strategy=[derpp,refresh]`.

    Args:
        mode: "official" or "paper".
        delta: length of an unlearning step relative to the norm of each tensor; official mode. 0 does nothing.
        gamma: rate of an unlearning step; paper mode. 0 does nothing. Ours: at the rates of 0.02 and more that the
            paper is said to use, and F = 0, the Langevin noise alone would move every weight by 0.2 at each step.
        num_unlearn: paper's J, unlearning steps before each learning step.
        noise: factor of eps; None takes the mode's, 1e-3 or 1.
        damping: of F; multiplies it in official mode, is added to it in paper mode. None takes the mode's, 1e-3 or 1.
        decay: how much of the running F an experience leaves.
        importance_rows: rows of each experience that F is measured on; None takes all of them, as the code does.

    Raises:
        UserError: in paper mode, a strategy behind this one still changes the batch, so its loss is not known yet; or
            the stream has one experience, so that no Fisher information is ever measured before it would be used.

    Cost: num_unlearn times the rows of the first micro-batch forward and backward per step (paper mode: with the rows
    that other strategies add to it); at the end of an experience importance_rows rows forward and backward.
    """

    moves_weights = True
    contract = Contract(
        toy={"delta": 1e-3, "importance_rows": 64},
        zero={"delta": 0.0, "noise": 0.0},
        why_not_better="it moves weights by a hundred-thousandth; on MNIST no gain was measured",
        acts_at_once=True,
        why_not_cut="it unlearns the rows of the first micro-batch",
    )

    def __init__(
        self,
        mode: str = "official",
        delta: float = 1e-5,
        gamma: float = 1e-7,
        num_unlearn: int = 1,
        noise: float | None = None,
        damping: float | None = None,
        decay: float = 1e-5,
        importance_rows: int | None = None,
    ) -> None:
        require_choice("refresh.mode", mode, tuple(DAMPING))
        require_number("refresh.delta", delta)
        require_number("refresh.gamma", gamma)
        require_count("refresh.num_unlearn", num_unlearn)
        self.noise = NOISE[mode] if noise is None else noise
        self.damping = DAMPING[mode] if damping is None else damping
        require_number("refresh.noise", self.noise)
        require_number("refresh.damping", self.damping)
        # stands alone for F until one has been measured
        allowed = "above 0 in paper mode, since there is no Fisher estimate yet in the first experience"
        require(mode != "paper" or self.damping > 0, "refresh.damping", self.damping, allowed)
        require_number("refresh.decay", decay)
        require_count("refresh.importance_rows", importance_rows, none_means="all rows")
        self.mode, self.delta, self.gamma, self.num_unlearn = mode, delta, gamma, num_unlearn
        self.decay, self.importance_rows = decay, importance_rows
        self.fisher: Vectors = {}

    def check(self, stream: Stream) -> None:
        if self.mode == "paper" and not self.is_off and len(stream.experiences) == 1:
            raise UserError(
                f"refresh.mode is 'paper', which goes by the Fisher information of earlier experiences, and stream "
                f"{stream.info.name} has one experience, with no estimate of it yet; use official, or a longer stream"
            )

    @property
    def is_off(self) -> bool:
        return (self.delta if self.mode == "official" else self.gamma) == 0

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        behind = strategies[list(strategies).index(self) + 1 :]
        late = [strategy.name for strategy in behind if overrides(strategy, "on_batch")]
        if self.mode == "paper" and late:
            raise UserError(
                f"refresh.mode is 'paper', which unlearns the whole loss, and {', '.join(late)} behind it changes the "
                f"batch; put {self.name} last, as in strategy=[{','.join(late)},{self.name}]"
            )

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if not self.is_off and state.micro_step == 0:
            for _ in range(self.num_unlearn):
                self._unlearn(state, batch)
        return batch

    def _unlearn(self, state: TrainState, batch: Batch) -> None:
        """One step uphill."""
        parameters, generator = state.parameters(), state.seeds.named(self.name)
        with buffers_kept(state.model):
            loss = self._target(state, batch)
            gradients = state.gradients(loss, parameters.values())
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                if g is not None:
                    eps = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) if self.noise else None
                    p.add_(self._displacement(p, g, self.fisher.get(name), eps))

    def _target(self, state: TrainState, batch: Batch) -> Tensor:
        """The loss to climb."""
        if self.mode == "official":
            current = batch.current()
            return state.label_loss(state.forward(current), current)
        first, *others = state.loss(batch)[1].values()
        return sum(others, start=first)

    def _displacement(self, p: Tensor, g: Tensor, fisher: Tensor | None, eps: Tensor | None) -> Tensor:
        if self.mode == "official":
            # what is behind a closed gate has no gradient at all, and a ratio that overflows
            size = g.norm()
            drift = g * torch.where(size >= torch.finfo(g.dtype).tiny, p.norm() / size, 0)
            if eps is not None:
                drift.add_(eps, alpha=self.noise)
            return drift.mul_(self.delta if fisher is None else self.delta / (1 + self.damping * fisher))
        inverse = 1 / (self.damping if fisher is None else fisher + self.damping)
        drift = self.gamma * inverse * g
        return drift if eps is None else drift + self.noise * (2 * self.gamma * inverse) ** 0.5 * eps

    def on_experience_end(self, state: TrainState) -> None:
        if self.is_off:
            return
        num_rows = len(state.data)
        index = draw_without_replacement(num_rows, self.importance_rows or num_rows, state.seeds.named(self.name))
        loss = likelihood_weighted if self.mode == "official" else F.cross_entropy
        fisher = mean_over_rows(state, index, loss, torch.square)
        for name, running in self.fisher.items():
            fisher[name] += self.decay * running
        self.fisher = fisher

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        rows = Cost(batch_size, batch_size)
        if self.mode == "paper":
            # what others add to the batch and the loss; rows they take elsewhere, as A-GEM does, are not repeated
            others = [strategy for strategy in state.strategies if not isinstance(strategy, Refresh)]
            adding = [s for s in others if overrides(s, "on_batch") or overrides(s, "penalty")]
            rows = sum((strategy.cost(state, batch_size) for strategy in adding), start=rows)
        # of a step that is cut, the first piece: others spread what they add evenly
        times, pieces = 0 if self.is_off else self.num_unlearn, state.micro_steps
        forwards, backwards = (times * math.ceil(count / pieces) for count in (rows.forwards, rows.backwards))
        return Cost(forwards, backwards, tensor_bytes(self.fisher))

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fisher = copied(state["fisher"])


def likelihood_weighted(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Mean over rows of sqrt(p) * -log p, p held fixed: the square of a row's gradient is p times that of log p.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> torch.autograd.grad(likelihood_weighted(z, torch.tensor([1])), z)[0].square()
        tensor([[0.1250, 0.1250]])
    """
    log_p_B = -F.cross_entropy(logits_BC, targets_B, reduction="none")
    return -((log_p_B.detach() / 2).exp() * log_p_B).mean()
