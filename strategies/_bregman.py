"""Bregman divergences, and the convex functions whose divergences are the penalties of known strategies.

    D_F(p, q) = F(p) - F(q) - <grad F(q), p - q>

docs/unified_objective.md says which strategy is which; tests/oracles/test_bregman.py holds them to it.
Source: Wang et al., "A Unified and General Framework for Continual Learning", ICLR 2024.

Shape legend: C outputs, K numbers of a parameter vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Convex = Callable[[Tensor], Tensor]
"""A differentiable convex function of a vector: (K,) -> scalar."""


def bregman(function: Convex, p: Tensor, q: Tensor) -> Tensor:
    """D_F(p, q), at least 0, and 0 where p = q; not symmetric.

    Args:
        p: (K,) where F is defined.
        q: (K,) where F has a gradient.

    Example:
        >>> p, q = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
        >>> bregman(squared_norm, p, q)
        tensor(5.)
    """
    slope = torch.func.grad(function)(q)
    return function(p) - function(q) - torch.dot(slope.flatten(), (p - q).flatten())


def negative_entropy(p_C: Tensor) -> Tensor:
    """sum p log p over a distribution; D is the Kullback-Leibler divergence KL(p || q)."""
    return torch.xlogy(p_C, p_C).sum()


def bernoulli_negative_entropy(p_C: Tensor) -> Tensor:
    """sum p log p + (1 - p) log(1 - p) over independent events; D is the sum of their divergences."""
    return negative_entropy(p_C) + negative_entropy(1 - p_C)


def squared_norm(v: Tensor) -> Tensor:
    """|v|^2; D is the squared distance."""
    return v.square().sum()


def quadratic(weights: Tensor) -> Convex:
    """v -> sum weights v^2; D is the weighted squared distance."""
    return partial(_weighted, weights)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    return (weights * v.square()).sum()


def gaussian_log_partition(natural: Tensor) -> Tensor:
    """Log-partition of independent Gaussians; D(eta_old, eta_new) = KL(new || old).

    Args:
        natural: (2, K) mean / variance, and -1 / (2 variance), which is below 0.
    """
    first, second = natural
    return (-first.square() / (4 * second) + 0.5 * torch.log(-math.pi / second)).sum()


def gaussian_natural(mean: Tensor, variance: Tensor) -> Tensor:
    """(2, K) natural parameters."""
    return torch.stack([mean / variance, -0.5 / variance])
