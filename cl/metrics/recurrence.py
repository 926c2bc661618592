"""Streams in which domains come back: what is left after so long without practice, and where a long stream ends up.

A domain is practised by an experience that trains on rows of it, whether it teaches the domain or rehearses it
(`EvalTable.practised`). Notation as in `cl.metrics.forgetting`; u_j(i) = last experience up to i that practised domain
j, so that the lag i - u_j(i) is 0 while it is being practised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cl.metrics.forgetting import mean
from cl.metrics.matrix import EvalTable, FloatArray, IntArray

MIN_POINTS = 3
"""Lags that a fitted law needs: through two points every law goes."""

# of log values that agree in twelve digits: what is left between them is rounding
_LEVEL_VARIANCE = 1e-24


class RevisitCurve(NamedTuple):
    """The measure against the time since the last practice.

    Args:
        lag: [L] experiences since the last practice, rising; 0 is the end of an experience that practised the domain.
        value: [L] mean measure over all pairs of that lag.
        num_pairs: [L] how many pairs that are.
    """

    lag: IntArray
    value: FloatArray
    num_pairs: IntArray


class PowerLaw(NamedTuple):
    """value = scale * lag ** -exponent, NaN where nothing was fitted.

    Args:
        r2: share of the variance of log value that it explains, weighted as the fit was.
    """

    scale: float = math.nan
    exponent: float = math.nan
    r2: float = math.nan

    @property
    def is_defined(self) -> bool:
        return not math.isnan(self.exponent)

    def at(self, lag: ArrayLike) -> FloatArray:
        """The law's value at each lag."""
        return self.scale * np.asarray(lag, dtype=np.float64) ** -self.exponent


def revisit_curve(table: EvalTable) -> RevisitCurve:
    """The retention curve: how good a domain is so many experiences after it was last practised.

    A(lag) = mean over {(i, j): i - u_j(i) = lag} of R[i, j]

    Returns: lags that occur, in order. Cells before the first practice and cells that were not evaluated are left out.
    Source: definition of this project; retention against time since last practice is the axis of Wixted & Ebbesen,
        "On the form of forgetting", 1991.

    Example:
        >>> curve = revisit_curve(EvalTable.from_rows([[1.0, 0.0], [0.5, 0.75], [0.25, 0.5]], trained=[0, 1, 1]))
        >>> curve.lag.tolist(), curve.value.tolist(), curve.num_pairs.tolist()
        ([0, 1, 2], [0.75, 0.5, 0.25], [3, 1, 1])
    """
    T, D = table.R.shape
    last = np.full(D, -1)
    lags = np.full((T, D), -1)
    for i, practised in enumerate(table.practised):
        last[practised] = i
        lags[i] = np.where(last >= 0, i - last, -1)
    known = (lags >= 0) & ~np.isnan(table.R)
    count = np.bincount(lags[known])
    total = np.bincount(lags[known], weights=table.R[known])
    (lag,) = np.nonzero(count)
    return RevisitCurve(lag, total[lag] / count[lag], count[lag])


def fit_power_law(lag: ArrayLike, value: ArrayLike, weight: ArrayLike | None = None) -> PowerLaw:
    """Fit value = a lag^-b by least squares in log-log coordinates.

    log value = log a - b log lag, over the points with lag >= 1 and value > 0 (the law has no value at lag 0, and the
    logarithm none at 0)

    Args:
        weight: of each point, such as the number of observations behind it; all equal when None.

    Returns: undefined with fewer than 3 lags among such points.

    Example:
        >>> law = fit_power_law([1, 2, 4], [0.8, 0.4, 0.2])
        >>> round(law.scale, 6), round(law.exponent, 6), round(law.r2, 6)
        (0.8, 1.0, 1.0)
    """
    lags, values = np.asarray(lag, dtype=np.float64), np.asarray(value, dtype=np.float64)
    weights = np.ones_like(lags) if weight is None else np.asarray(weight, dtype=np.float64)
    used = (lags >= 1) & (values > 0) & (weights > 0)
    if np.unique(lags[used]).size < MIN_POINTS:
        return PowerLaw()
    x, y, w = np.log(lags[used]), np.log(values[used]), weights[used] / weights[used].sum()
    x0, y0 = w @ x, w @ y
    slope = w @ ((x - x0) * (y - y0)) / (w @ (x - x0) ** 2)
    spread, left = w @ (y - y0) ** 2, w @ (y - y0 - slope * (x - x0)) ** 2
    # a level line, whose mean may be off in the last digit, is explained fully by the exponent 0
    r2 = float(1 - left / spread) if spread > _LEVEL_VARIANCE else 1.0
    return PowerLaw(float(np.exp(y0 - slope * x0)), float(-slope), r2)


def retention_exponent(table: EvalTable) -> float:
    """Exponent b of the power law A(lag) = a lag^-b (loss: a lag^b) through `revisit_curve`, every pair counting once.

    Returns: larger means faster forgetting; near 0 nothing is lost with time. NaN unless domains come back, and with
        fewer than 3 lags.
    """
    if not table.recurs:
        return math.nan
    exponent = fit_power_law(*revisit_curve(table)).exponent
    return exponent if table.measure == "accuracy" else -exponent


def late_average(table: EvalTable) -> float:
    """Where a long stream ends up: the mean over all domains, averaged over the last fifth of the experiences.

    1/|W| sum_{i in W} 1/D sum_j R[i, j], W the last ceil(T / 5) experiences

    With few classes per experience a single row swings by several points from one to the next. With T <= 5 it is
    `final`.

    Source: the window of the last 50 of 250 experiences, on which SCoLe streams are compared (Lesort et al., 2023,
        publish curves).

    Example:
        >>> late_average(EvalTable.from_rows([[0.0, 0.0]] * 8 + [[0.5, 0.25], [1.0, 0.25]], trained=[0, 1] * 5))
        0.5
    """
    T = table.num_experiences
    return mean([mean(row) for row in table.R[T - math.ceil(T / 5) :]])
