"""What is left after so long without practice, as numbers: for streams in which domains come back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cl import metrics
from cl.metrics.matrix import EvalTable, FloatArray, IntArray
from cl.metrics.recurrence import PowerLaw


@dataclass(frozen=True)
class Revisit:
    """Retention over all seeds of a strategy, every pair of experience and domain counting once.

    Args:
        lag: [L] experiences since the last practice, from 1, rising.
        value: [L] mean measure.
        count: [L] pairs behind each.
        practised: mean measure at the end of the experiences that practised a domain.
        law: fitted to the points in log-log coordinates; undefined where there are too few.
    """

    lag: IntArray
    value: FloatArray
    count: IntArray
    practised: float
    law: PowerLaw
    num_seeds: int


def retention(tables: Iterable[EvalTable]) -> Revisit | None:
    """The retention of one strategy; None where nothing comes back, or nothing was ever left alone."""
    curves = [metrics.revisit_curve(table) for table in tables if table.recurs]
    longest = max((int(curve.lag[-1]) for curve in curves if curve.lag.size), default=0)
    if longest == 0:
        return None
    count, total = np.zeros(longest + 1, dtype=np.int64), np.zeros(longest + 1)
    for curve in curves:
        count[curve.lag] += curve.num_pairs
        total[curve.lag] += curve.num_pairs * curve.value
    (lag,) = np.nonzero(count)
    value = total[lag] / count[lag]
    late = lag > 0
    return Revisit(
        lag=lag[late],
        value=value[late],
        count=count[lag][late],
        practised=float(value[0]) if lag[0] == 0 else math.nan,
        law=metrics.fit_power_law(lag, value, count[lag]),
        num_seeds=len(curves),
    )


def law_text(found: Revisit) -> str:
    """The exponent and how well it fits.

    Example:
        >>> law_text(Revisit(np.array([1]), np.array([0.5]), np.array([1]), 0.9, PowerLaw(0.5, 0.25, 0.9), 1))
        'lag^−0.25, R² 0.90'
    """
    if not found.law.is_defined:
        return "too few lags for a law"
    sign = "−" if found.law.exponent >= 0 else ""
    return f"lag^{sign}{abs(found.law.exponent):.2f}, R² {found.law.r2:.2f}"
