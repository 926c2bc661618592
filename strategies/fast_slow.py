"""Fast and slow weights: each experience trains a fast copy, of which the slow weights take a part and remember.

    theta_fast <- theta_slow                                                         start of an experience
    loss = CE + strength / 2 * sum_i F_i (theta_fast,i - theta_slow,i)^2             every step
    theta_slow <- theta_slow + epsilon (theta_fast - theta_slow)                     end of the experience,
    F <- gamma F + mean over rows of (d log p(y | x) / d theta_slow)^2               then this

Both are in one network: it holds the fast weights while it trains and the slow ones when it is measured in between.

Source: Wang, Li, Zhong & Zhu, "Few-shot Continual Learning: a Brain-inspired Approach" (fast and slow weights updated
in dependence of each other, with a two-step consolidation), 2021. No code was found, so this is our reading: the first
step of consolidation is that of Reptile (Nichol et al., "On First-Order Meta-Learning Algorithms", 2018), the second
that of online EWC (Schwarz et al., "Progress & Compress", ICML 2018).
Differences: the first experience has no past, and the slow weights take all of it. Running statistics of batch norm are
those of the fast weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require, require_number
from strategies._importance import DataImportance
from strategies._quadratic import snapshot


class FastSlow(DataImportance):
    """Move slowly after every experience, held by the Fisher information of the slow weights.

    Args:
        strength: of the pull towards the slow weights; 0 measures nothing.
        epsilon: how far the slow weights go towards the fast ones; 1 is all the way.
        gamma: how much of the Fisher information an experience leaves.
        importance_rows: rows of each experience that it is measured on; None takes all of them.

    Cost: no rows per step; at the end of an experience importance_rows rows forward and backward.
    """

    moves_weights = True
    contract = Contract(
        toy={"strength": 5.0, "epsilon": 0.5}, zero={"strength": 0.0, "epsilon": 1.0}, forgets_less_by=0.2
    )

    def __init__(
        self,
        strength: float = 10.0,
        epsilon: float = 0.5,
        gamma: float = 1.0,
        importance_rows: int | None = 1000,
    ) -> None:
        super().__init__(strength, importance_rows, convention="per_row")
        require_number("fast_slow.epsilon", epsilon, above=0.0)
        require(epsilon <= 1, "fast_slow.epsilon", epsilon, "at most 1")
        require_number("fast_slow.gamma", gamma)
        require(gamma <= 1, "fast_slow.gamma", gamma, "at most 1")
        self.epsilon, self.gamma = epsilon, gamma

    @property
    def factor(self) -> float:
        return self.strength / 2

    def on_experience_end(self, state: TrainState) -> None:
        if self.strength == 0 and self.epsilon == 1:
            return
        if self.anchor and self.epsilon < 1:
            # the anchor is where the experience started: the slow weights
            with torch.no_grad():
                for name, p in state.parameters().items():
                    p.copy_(torch.lerp(self.anchor[name], p, self.epsilon))
        if self.strength > 0:
            fisher = self.measured(state, F.cross_entropy, torch.square)
            for name, running in self.importance.items():
                fisher[name] += self.gamma * running
            self.importance = fisher
        self.anchor = snapshot(state)
