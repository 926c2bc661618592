"""Weights that stay as they are while the rest of a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AtRest = Sequence[tuple[Tensor, Tensor]]
"""Parameters, and where they must not move: bool, of their shape or for all of it."""


def clear_gradients(at_rest: AtRest) -> None:
    """A norm that gradients are clipped by should know of no weight that cannot move."""
    for p, is_held in at_rest:
        if p.grad is not None:
            p.grad.masked_fill_(is_held, 0.0)


def step_beside(at_rest: AtRest, update: Callable[[], None]) -> None:
    """Update all others: momentum, weight decay and the pull of other strategies do not move these either."""
    before = [p.detach().clone() for p, _ in at_rest]
    update()
    with torch.no_grad():
        for (p, is_held), old in zip(at_rest, before, strict=True):
            p.copy_(torch.where(is_held, old, p))
