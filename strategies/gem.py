"""Gradient episodic memory: a step may not increase the loss on the stored rows of any past experience.

    g' = g + sum_k v_k g_k,   v = argmin 1/2 v' (G G' + ridge I) v + v' G g   subject to v_k >= margin

with one row g_k of G per past experience. It is solved when some g . g_k < 0, and g' = g otherwise. With margin 0 and
ridge 0 this is the dual of: g' nearest to g with g' . g_k >= 0 for all k.

Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, with the constants of the
authors' code (facebookresearch/GradientEpisodicMemory model/gem.py), which mammoth and Avalanche keep.
Differences: solved as non-negative least squares on a Cholesky factor through SciPy, so that no further solver is
needed. The memory holds random rows of each finished experience, not its newest ones. All parameters are projected,
see `agem`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cl.hooks import Contract
from cl.state import Cost, TrainState
from strategies._checks import require_number
from strategies._episodic import EpisodicMemory, flattened, loss_gradient, write_gradient


class Gem(EpisodicMemory):
    """Project the gradient onto the cone in which no past experience's loss increases.

    Args:
        capacity: rows stored, capacity // number of experiences of each.
        margin: smallest weight of every past gradient in a projected step (paper's gamma); favours backward transfer.
        ridge: added to the diagonal of the dual problem.

    Cost: all stored rows forward and backward per step, and one vector of the size of the network per past experience
    while the step lasts.
    """

    parallel = frozenset({"ddp"})
    contract = Contract(toy={"capacity": 90}, why_not_zero="a projection has no strength", forgets_less_by=0.3)

    def __init__(self, capacity: int = 200, margin: float = 0.5, ridge: float = 1e-3) -> None:
        super().__init__(capacity, replay_batch_size=None, memory="per_experience")
        require_number("gem.margin", margin)
        require_number("gem.ridge", ridge, above=0.0)
        self.margin, self.ridge = margin, ridge

    def on_gradients(self, state: TrainState) -> None:
        if len(self.buffer) == 0:
            return
        owners = self.buffer.columns["experience_id"][: len(self.buffer)]
        past = torch.stack([self._gradient_of(state, owners == k) for k in owners.unique()])
        parameters = list(state.parameters().values())
        gradient = flattened(parameters, [p.grad for p in parameters])
        if (past @ gradient < 0).any():
            write_gradient(parameters, project(gradient, past, self.margin, self.ridge))

    def _gradient_of(self, state: TrainState, is_wanted: Tensor) -> Tensor:
        rows = self.buffer.rows(is_wanted.nonzero().squeeze(1))
        return loss_gradient(state, state.prepare(rows, self.generator(state)))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(len(self.buffer), len(self.buffer), self.buffer_bytes)


def project(gradient: Tensor, past: Tensor, margin: float, ridge: float) -> Tensor:
    """Gradient (P,) moved along the past gradients (K, P) until it agrees with all of them.

    Example:
        >>> past = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> [round(x, 3) for x in project(torch.tensor([1.0, -1.0]), past, margin=0.0, ridge=1e-9).tolist()]
        [1.0, 0.0]
    """
    gram, products = (past @ past.T).double().cpu().numpy(), (past @ gradient).double().cpu().numpy()
    weights = dual(gram + ridge * np.eye(len(gram)), products, margin)
    return gradient + torch.from_numpy(weights).to(past) @ past


def dual(quadratic: np.ndarray, linear: np.ndarray, margin: float) -> np.ndarray:
    """argmin over v >= margin of 1/2 v' A v + v' b, for a positive definite A (K, K) and b (K,).

    With v = margin + u and A = L L' this is 1/2 |L' u + L^-1 (b + A margin)|^2 + constant, over u >= 0.
    """
    # imported here: SciPy's optimizers take long to load, and most runs do not need them
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    factor = np.linalg.cholesky(quadratic)
    shifted = linear + quadratic @ np.full(len(linear), margin)
    target = -solve_triangular(factor, shifted, lower=True)
    return margin + nnls(factor.T, target)[0]
