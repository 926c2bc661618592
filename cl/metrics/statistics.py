"""Statistics of one strategy or one pair over seeds.

Everything is paired: a seed fixes initialisation, data order and buffer draws, and strategies under comparison share
their seeds. Runs are the independent samples; the domains inside a run are not, so nothing here resamples domains.

scipy is the only library; it is imported at first use, because `cl --help` must not wait for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cl.metrics.matrix import FloatArray

# significance level of every test, and one minus the confidence of every interval
ALPHA = 0.05
NUM_RESAMPLES = 9999
# BCa estimates bias and acceleration from the sample itself; from fewer values these are noise
_MIN_SEEDS_FOR_BCA = 8


class Interval(NamedTuple):
    """A 95 % confidence interval; NaN at both ends where there is none."""

    low: float = math.nan
    high: float = math.nan


def bootstrap_ci(values: ArrayLike, *, seed: int = 0) -> Interval:
    """95 % bootstrap confidence interval of a mean over seeds: BCa from 8 values on, percentile below.

    For a paired comparison give it the differences: `bootstrap_ci(a - b)`.

    Args:
        values: [n], one per training seed.
        seed: of the resampling; fixed, so that a report made twice says the same.

    Returns: no interval when n < 2 or a value is NaN. From 3 to 7 values the interval is too narrow (5 normal values:
        it covers the mean about 5 times in 6): read it as the least uncertainty there is.
    Source: Efron (1987), through `scipy.stats.bootstrap`.

    Example:
        >>> low, high = bootstrap_ci([0.70, 0.72, 0.74, 0.76])
        >>> round(low, 2), round(high, 2)
        (0.71, 0.75)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2 or np.isnan(values).any():
        return Interval()
    if nonzero(np.ptp(values)).size == 0:
        # every resample is the same, but for rounding, and BCa divides by the spread
        return Interval(float(values.min()), float(values.max()))
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=1 - ALPHA,
        method="BCa" if values.size >= _MIN_SEEDS_FOR_BCA else "percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def nonzero(differences: ArrayLike) -> FloatArray:
    """The differences that carry a sign, rounded: floating-point noise must neither break nor make a tie."""
    rounded = np.round(np.asarray(differences, dtype=np.float64), 12)
    return rounded[rounded != 0]


def wilcoxon_signed_rank(differences: ArrayLike) -> float:
    """Exact two-sided p of the Wilcoxon signed-rank test, with ties.

    p = min(1, 2 min(P(W <= w), P(W >= w))), where w is the sum of the ranks of |d| over d > 0, and W the same sum
    under all 2^n equally likely sign patterns

    Args:
        differences: [n], one per shared seed. Zeros are dropped, as Wilcoxon did.

    Returns: NaN without differences or when one is NaN; 1 when all are zero; never below 2 / 2^n.
    Cost: O(n^3) additions.
    Source: Wilcoxon (1945). Differences: `scipy.stats.wilcoxon(method="exact")` is exact without ties only, and
        accuracies on a small test set tie; without ties the two agree.

    Example:
        >>> wilcoxon_signed_rank([0.1, 0.2, 0.3, 0.4, 0.5])
        0.0625
    """
    from scipy.stats import rankdata

    informative = nonzero(differences)
    if np.size(differences) == 0 or np.isnan(informative).any():
        return math.nan
    # midranks are multiples of one half: doubled, they are whole numbers that can index the distribution of W
    ranks = (2 * rankdata(np.abs(informative))).astype(int)
    distribution = np.ones(1)
    for rank in ranks:
        distribution = (np.pad(distribution, (0, rank)) + np.pad(distribution, (rank, 0))) / 2
    w = ranks[informative > 0].sum()
    return float(min(1, 2 * min(distribution[: w + 1].sum(), distribution[w:].sum())))


def holm(p_values: ArrayLike) -> FloatArray:
    """Holm's adjustment: the chance of any false discovery among m comparisons stays below the level.

    p'_(k) = max_{l <= k} min(1, (m - l + 1) p_(l)), with p_(1) <= ... <= p_(m)

    Args:
        p_values: [m]; NaN (no test was possible) stays NaN and is not counted in m.

    Source: Holm (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(6).tolist()
        [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    m = np.count_nonzero(~np.isnan(p_values))
    order = np.argsort(p_values)[:m]  # NaN sorts last
    adjusted = np.full(p_values.shape, np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, np.arange(m, 0, -1) * p_values[order]))
    return adjusted


def seeds_needed(num_comparisons: int = 1) -> int:
    """Fewest seeds with which Wilcoxon and Holm can be significant at all: 2 / 2^n <= 0.05 / m.

    Example:
        >>> seeds_needed(), seeds_needed(6), seeds_needed(9)
        (6, 8, 9)
    """
    return math.ceil(1 + math.log2(num_comparisons / ALPHA))
