"""Strategies side by side over shared seeds: the table behind `cl compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cl.metrics.forgetting import mean
from cl.metrics.matrix import FloatArray
from cl.metrics.statistics import ALPHA, bootstrap_ci, holm, nonzero, seeds_needed, wilcoxon_signed_rank


@dataclass(frozen=True)
class Row:
    """One strategy over its seeds and, with a reference, against it.

    Args:
        num_seeds: runs with a defined value; `mean`, `sd` and the interval rest on these.
        sd: with n - 1; NaN for one run.
        ci_low, ci_high: 95 % bootstrap interval of the mean.
        num_pairs: seeds shared with the reference; everything below rests on these.
        unpaired_seeds: seeds that only one of the two has, left out of the comparison.
        difference: mean of (strategy - reference); NaN for the reference itself.
        difference_low, difference_high: 95 % bootstrap interval of that mean.
        p_value: exact two-sided Wilcoxon signed-rank test.
        p_holm: the same, adjusted for the number of strategies compared with the reference.
        verdict: the outcome on the shared seeds as a sentence; empty without a comparison.
    """

    strategy: str
    num_seeds: int
    mean: float
    sd: float
    ci_low: float
    ci_high: float
    num_pairs: int = 0
    unpaired_seeds: tuple[int, ...] = ()
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    p_value: float = math.nan
    p_holm: float = math.nan
    verdict: str = ""


def compare(values: Mapping[str, Mapping[int, float]], reference: str | None = None) -> list[Row]:
    """Describe every strategy, and test each against the reference on the seeds that both have.

    Args:
        values: strategy -> seed -> value of one metric. NaN (metric undefined) counts as a missing run.
        reference: a strategy of `values`; None to describe only.

    Returns: one row per strategy, in the order given.
    Raises: ValueError: the reference is no strategy of `values`.

    Example:
        >>> naive = {0: 0.25, 1: 0.5, 2: 0.375}
        >>> replay = {0: 0.75, 1: 0.75, 2: 0.875}
        >>> _, row = compare({"naive": naive, "replay": replay}, reference="naive")
        >>> row.num_pairs, round(row.difference, 3), row.p_value
        (3, 0.417, 0.25)
        >>> row.verdict
        'higher than naive by 0.4167; 3 differing pairs cannot reach significance (Holm p is at least 0.25), 6 can'
    """
    if reference is not None and reference not in values:
        raise ValueError(f"reference {reference!r} is not among the strategies {', '.join(values)}")
    defined = {
        strategy: {seed: value for seed, value in runs.items() if not math.isnan(value)}
        for strategy, runs in values.items()
    }
    rows = [_described(strategy, runs) for strategy, runs in defined.items()]
    if reference is None:
        return rows
    return _tested(rows, defined, reference)


def _described(strategy: str, runs: Mapping[int, float]) -> Row:
    values = np.array(list(runs.values()))
    sd = float(values.std(ddof=1)) if values.size > 1 else math.nan
    return Row(strategy, values.size, mean(values), sd, *bootstrap_ci(values))


def _tested(rows: list[Row], runs: Mapping[str, Mapping[int, float]], reference: str) -> list[Row]:
    differences = {
        row.strategy: _paired_differences(runs[row.strategy], runs[reference])
        for row in rows
        if row.strategy != reference
    }
    p_values = [wilcoxon_signed_rank(d) for d in differences.values()]
    # p is smallest when all differences have one sign; Holm grows with each p, so this bounds what it can give
    floors = [wilcoxon_signed_rank(np.abs(d)) for d in differences.values()]
    num_comparisons = int(np.count_nonzero(~np.isnan(p_values)))
    tests = dict(zip(differences, zip(p_values, holm(p_values), holm(floors), strict=True), strict=True))

    tested = []
    for row in rows:
        if row.strategy != reference:
            difference = differences[row.strategy]
            p_value, p_holm, floor = map(float, tests[row.strategy])
            low, high = bootstrap_ci(difference)
            row = replace(
                row,
                num_pairs=difference.size,
                unpaired_seeds=tuple(sorted(runs[row.strategy].keys() ^ runs[reference].keys())),
                difference=mean(difference),
                difference_low=low,
                difference_high=high,
                p_value=p_value,
                p_holm=p_holm,
                verdict=_verdict(difference, reference, p_holm, floor, num_comparisons),
            )
        tested.append(row)
    return tested


def _paired_differences(own: Mapping[int, float], other: Mapping[int, float]) -> FloatArray:
    return np.array([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])


def _verdict(difference: FloatArray, reference: str, p_holm: float, floor: float, num_comparisons: int) -> str:
    num_differing = nonzero(difference).size
    if difference.size == 0:
        return f"no seed in common with {reference}"
    if num_differing == 0:
        return f"equal to {reference} on every shared seed"
    change = f"{'higher' if mean(difference) > 0 else 'lower'} than {reference} by {abs(mean(difference)):.4g}"
    if nonzero(mean(difference)).size == 0:
        change = f"on average equal to {reference}"
    if floor > ALPHA:
        return (
            f"{change}; {num_differing} differing pairs cannot reach significance "
            f"(Holm p is at least {floor:.3g}), {seeds_needed(num_comparisons)} can"
        )
    return f"{change}, {'significant' if p_holm <= ALPHA else 'not significant'} (Holm p = {p_holm:.3g})"
