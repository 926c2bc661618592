"""One number per strategy over several streams: interquartile mean and average ranks.

Both go through scipy. `rliable` 1.2.0, the reference for the first, cannot be imported beside pandas 3 (it needs
`arch`); `autorank` 1.3.0, a reference for the second, brings pandas, statsmodels, matplotlib and baycomp for two
formulas. The tests hold us equal to both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cl.metrics.matrix import FloatArray
from cl.metrics.statistics import ALPHA, NUM_RESAMPLES, Interval


def interquartile_mean(scores: Mapping[str, ArrayLike], *, seed: int = 0) -> tuple[float, Interval]:
    """Mean of the middle half of all runs of one strategy, with a bootstrap interval stratified by stream.

    Args:
        scores: stream -> [n] values over seeds, on a scale that all streams share (accuracies, not raw losses).
        seed: of the resampling.

    Returns: the interquartile mean, and its 95 % percentile interval from resampling the seeds of each stream apart;
        no interval when a stream has fewer than 2 runs.
    Source: Agarwal et al. (2021), "Deep RL at the edge of the statistical precipice".

    Example:
        >>> iqm, (low, high) = interquartile_mean({"digits": [0.1, 0.6, 0.7, 0.8], "mnist": [0.5, 0.6, 0.7, 1.0]})
        >>> round(iqm, 3)
        0.65
    """
    from scipy.stats import bootstrap, trim_mean

    def statistic(*streams: FloatArray, axis: int = -1) -> FloatArray:
        return trim_mean(np.concatenate(streams, axis=axis), 0.25, axis=axis)

    samples = [np.asarray(values, dtype=np.float64) for values in scores.values()]
    if not samples:
        return math.nan, Interval()
    estimate = float(statistic(*samples))
    if math.isnan(estimate) or min(len(values) for values in samples) < 2:
        return estimate, Interval()
    found = bootstrap(
        samples,
        statistic,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        confidence_level=1 - ALPHA,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return estimate, Interval(float(found.low), float(found.high))


@dataclass(frozen=True)
class Ranking:
    """Average ranks of k strategies over N streams.

    Args:
        average_rank: strategy -> mean rank, 1 = best; ties share their mean rank.
        critical_difference: average ranks closer than this are not told apart by Nemenyi's test at 5 %.
        friedman_p: p of "all strategies are alike"; with a large one the ranks say nothing. NaN for k < 3, and
            where all tie on every stream.
    """

    average_rank: dict[str, float]
    critical_difference: float
    friedman_p: float


def average_ranks(scores: Mapping[str, ArrayLike], *, higher_is_better: bool = True) -> Ranking:
    """Rank the strategies on every stream and average: the numbers of a critical-difference diagram.

    CD = q sqrt(k (k + 1) / (6 N)), q = studentized range of k groups at 5 % / sqrt(2)

    Args:
        scores: strategy -> [N], its mean over seeds on each stream, in the same order for all.
        higher_is_better: direction of the score.

    Raises: ValueError: fewer than two strategies, different numbers of streams, or a missing score.
    Source: Demsar (2006), "Statistical comparisons of classifiers over multiple data sets".

    Example:
        >>> ranking = average_ranks({"naive": [0.2, 0.3], "replay": [0.8, 0.7], "joint": [0.9, 0.9]})
        >>> ranking.average_rank, round(ranking.critical_difference, 3)
        ({'naive': 3.0, 'replay': 2.0, 'joint': 1.0}, 2.344)
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    columns = [np.asarray(values, dtype=np.float64) for values in scores.values()]
    k = len(columns)
    if k < 2 or len({values.shape for values in columns}) > 1 or np.isnan(columns).any():
        raise ValueError(f"ranks need at least two strategies with one score on every stream; got {dict(scores)}")
    # floating-point noise must not break a tie
    table = np.round(np.stack(columns, axis=1), 12)
    num_streams = len(table)
    ranks = rankdata(-table if higher_is_better else table, axis=1)
    q = studentized_range.ppf(1 - ALPHA, k, np.inf) / math.sqrt(2)
    # Friedman's statistic is 0 / 0 where all strategies tie on every stream
    with np.errstate(invalid="ignore", divide="ignore"):
        friedman_p = float(friedmanchisquare(*table.T).pvalue) if k > 2 else math.nan
    return Ranking(
        average_rank=dict(zip(scores, ranks.mean(axis=0).tolist(), strict=True)),
        critical_difference=float(q * math.sqrt(k * (k + 1) / (6 * num_streams))),
        friedman_p=friedman_p,
    )
