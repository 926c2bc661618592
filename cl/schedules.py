"""Learning-rate schedules: pure functions of (step, total steps) that return a factor of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

Schedule = Callable[[int, int], float]
"""(step from 0, steps in the span) -> factor in [0, 1] of the optimizer's own rate."""


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's own rate, kept as `initial_lr`; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def _warmed(step: int, total: int, warmup_frac: float) -> tuple[float, float]:
    """Factor of the linear warm-up, and progress in [0, 1] through what comes after it."""
    warmup = round(warmup_frac * total)
    if step < warmup:
        return (step + 1) / warmup, 0.0
    return 1.0, min(1.0, (step - warmup) / max(1, total - warmup))


def constant(step: int, total: int, warmup_frac: float = 0.0) -> float:
    """The base rate throughout, after an optional linear warm-up.

    Example:
        >>> [constant(step, 4, warmup_frac=0.5) for step in range(4)]
        [0.5, 1.0, 1.0, 1.0]
    """
    return _warmed(step, total, warmup_frac)[0]


def linear(step: int, total: int, warmup_frac: float = 0.0, final: float = 0.0) -> float:
    """Straight line from 1 to `final`, which is reached at step `total`; clamped after.

    Example:
        >>> [linear(step, 4) for step in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    ramp, progress = _warmed(step, total, warmup_frac)
    return ramp * (1.0 + (final - 1.0) * progress)


def cosine(step: int, total: int, warmup_frac: float = 0.0, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final`, clamped after its end (Loshchilov & Hutter, 2017, without restarts).

    Example:
        >>> [round(cosine(step, 4), 3) for step in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    ramp, progress = _warmed(step, total, warmup_frac)
    return ramp * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
