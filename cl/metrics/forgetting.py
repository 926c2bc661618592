"""What R says at the ends of the experiences: averages, transfer, forgetting.

One rule for every function: a number that needs a cell which was not evaluated is NaN, and so is an average over no
domain (BWT of a single experience). It is never 0, and never an average over the cells that happen to be there. Two
functions look for what was evaluated and say so: the best earlier value, and the curve against the lag.

Sign: averages, BWT and FWT are in the unit of the measure, "later minus earlier"; the forgetting family is positive
when a domain got worse, for accuracies and for losses. So `bwt == -forgetting_first` for an accuracy, and
`bwt == forgetting_first` for a loss in nats, where every positive difference means worse.

Notation: T experiences, D domains, v_j the first visit of domain j, b = R_init. With every domain visited once and in
order v_j = j, and the formulas are those of the papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cl.metrics.matrix import EvalTable, FloatArray


def mean(values: ArrayLike, weights: Sequence[float] | None = None) -> float:
    """Mean in which nothing is skipped: NaN for no value, NaN when any value is NaN."""
    values = np.asarray(values, dtype=np.float64)
    return float(np.average(values, weights=weights)) if values.size else math.nan


def final(table: EvalTable, num_samples: Sequence[float] | None = None) -> float:
    """Mean of the last row (ACC), over every evaluated domain, visited or not.

    1/D sum_j R[T, j]

    Args:
        num_samples: [D] test sizes; given, the average is over samples (micro) and not over domains (macro).

    Returns: unit of the measure.
    Source: Lopez-Paz & Ranzato (2017).

    Example:
        >>> table = EvalTable.from_rows([[0.9, 0.1], [0.7, 0.8]])
        >>> final(table), final(table, num_samples=[100, 300])
        (0.75, 0.775)
    """
    return mean(table.last, num_samples)


def seen_average(table: EvalTable) -> FloatArray:
    """[T], after each experience the mean over the domains seen so far.

    A_i = 1/|S_i| sum_{j in S_i} R[i, j], S_i = {j: v_j <= i}, or all domains while no v_j exists (`EvalTable.seen`)
    """
    return np.array([mean(row[seen]) for row, seen in zip(table.R, table.seen, strict=True)])


def average(table: EvalTable) -> float:
    """Average incremental ("anytime") measure: mean over experiences of the mean over the domains seen so far.

    1/T sum_i A_i, with A_i of `seen_average`

    Source: Rebuffi et al. (2017), iCaRL. Differences: AAA of online learning takes the mean over training steps.

    Example:
        >>> average(EvalTable.from_rows([[0.9, 0.1], [0.6, 0.8]]))
        0.8
    """
    return mean(seen_average(table))


def learning(table: EvalTable) -> float:
    """Learning accuracy: how well a domain is known at the end of its first visit.

    LA = mean over visited j of R[v_j, j]

    Source: Riemer et al. (2019), MER.

    Example:
        >>> learning(EvalTable.from_rows([[0.75, 0.0], [0.5, 1.0]]))
        0.875
    """
    return mean(table.learned[table.first_visit < table.num_experiences])


def bwt(table: EvalTable) -> float:
    """Backward transfer.

    BWT = mean over {j: v_j < T} of R[T, j] - R[v_j, j]

    Returns: accuracy: negative means forgetting. Loss: nats, positive means forgetting. NaN when T = 1.
    Source: Lopez-Paz & Ranzato (2017).

    Example:
        >>> round(bwt(EvalTable.from_rows([[0.9, 0.1], [0.7, 0.8]])), 6)
        -0.2
    """
    return mean((table.last - table.learned)[table.earlier])


def fwt(table: EvalTable) -> float:
    """Forward transfer: what training on the others did for a domain before its own first visit.

    FWT = mean over {j: v_j > 1} of R[v_j - 1, j] - b[j]

    Returns: accuracy: positive means that others helped. Loss: nats, positive means that they harmed. NaN when T = 1,
        without an evaluation before training, and where untrained heads are masked (`EvalTable.mask_untrained`).
    Source: Lopez-Paz & Ranzato (2017).

    Example:
        >>> round(fwt(EvalTable.from_rows([[0.9, 0.4], [0.7, 0.8]], R_init=[0.1, 0.1])), 6)
        0.3
    """
    first = table.first_visit
    (later,) = np.nonzero((first > 0) & (first < table.num_experiences))
    return mean(table.R[first[later] - 1, later] - table.R_init[later])


def forgetting_max_by_domain(table: EvalTable) -> FloatArray:
    """[D], best earlier value minus last (for a loss: last minus lowest earlier); NaN for domains not `earlier`."""
    # a language model comes with something to lose, so its loss before training counts as an earlier value;
    # the definition for accuracies (Chaudhry et al.) starts after the first experience
    first_row = 0 if table.measure == "loss" else 1
    best_earlier = table.best(np.vstack([table.R_init, table.R[:-1]])[first_row:])
    return np.where(table.earlier, table.worsening(best_earlier, table.last), np.nan)


def forgetting_max(table: EvalTable) -> float:
    """Forgetting from the best value ever reached.

    F = mean over {j: v_j < T} of (max_{l < T} R[l, j]) - R[T, j]; for a loss R[T, j] - min_{l < T} R[l, j] with b[j]
    among the earlier values. The best is taken over the evaluated cells.

    Returns: positive means worse; never below `forgetting_first`. NaN when T = 1.
    Source: Chaudhry et al. (2018), RWalk; the value before training for losses as in continual pre-training.

    Example:
        >>> table = EvalTable.from_rows([[0.8, 0.1, 0.1], [0.9, 0.7, 0.1], [0.6, 0.6, 0.9]])
        >>> round(forgetting_max(table), 6), round(forgetting_first(table), 6)
        (0.2, 0.15)
    """
    return mean(forgetting_max_by_domain(table)[table.earlier])


def forgetting_first(table: EvalTable) -> float:
    """Forgetting from the end of the first visit; Avalanche's `StreamForgetting`.

    mean over {j: v_j < T} of R[v_j, j] - R[T, j]; for a loss R[T, j] - R[v_j, j]

    Returns: positive means worse. NaN when T = 1 (Avalanche logs 0).
    """
    return mean(table.worsening(table.learned, table.last)[table.earlier])


def intransigence(table: EvalTable, reference: ArrayLike) -> float:
    """How much worse a domain is learned than by a reference that need not remember.

    I = mean over visited j of a*[j] - R[v_j, j]; for a loss R[v_j, j] - a*[j]

    Args:
        reference: [D], the measure of the reference on each domain. Name the reference when publishing: the last row
            of a joint run, or of one single-domain run per domain.

    Returns: positive means worse than the reference.
    Source: Chaudhry et al. (2018). Differences: theirs is I_k of one experience, with a model trained jointly on
        1..k; this is the mean over domains.

    Example:
        >>> round(intransigence(EvalTable.from_rows([[0.9, 0.1], [0.7, 0.8]]), reference=[0.95, 0.95]), 6)
        0.1
    """
    taught = table.first_visit < table.num_experiences
    return mean(table.worsening(reference, table.learned)[taught])


def aufc(table: EvalTable, positions: ArrayLike | None = None) -> float:
    """Area under the forgetting curve: forgetting since the first visit, averaged over the time since then.

    AUFC = mean over {j: v_j < T} of 1/(n_T - n_{v_j}) integral of (R[v_j, j] - R[n, j]) dn (negated for a loss),
    by the trapezoid rule on the ends of the experiences

    Args:
        positions: [T], increasing: n at the end of each experience, in steps, samples or tokens; 1, 2, ... when None.

    Returns: unit of the measure; positive means worse. NaN when T = 1.
    Source: definition of this project; there is no single standard one, so name the axis when publishing.

    Example:
        >>> table = EvalTable.from_rows([[0.9, 0.1, 0.1], [0.7, 0.9, 0.1], [0.7, 0.8, 0.9]])
        >>> round(aufc(table), 6)
        0.1
    """
    positions = np.arange(table.num_experiences) if positions is None else np.asarray(positions, dtype=np.float64)
    if len(positions) != table.num_experiences or (np.diff(positions) <= 0).any():
        raise ValueError(f"positions must be {table.num_experiences} increasing numbers, one per experience")
    first, curves = table.first_visit, table.worsening(table.learned, table.R)
    areas = []
    for j in np.flatnonzero(table.earlier):
        since = slice(first[j], None)
        areas.append(np.trapezoid(curves[since, j], positions[since]) / np.ptp(positions[since]))
    return mean(areas)


def forgetting_by_lag(table: EvalTable) -> dict[int, float]:
    """The forgetting curve of a stream with revisits: forgetting since the last visit against the lag.

    f(lag) = mean over {(i, j): last visit of j up to i is u, i - u = lag} of R[u, j] - R[i, j] (negated for a loss)

    A visit is an experience that is there to teach the domain (`EvalTable.taught`); what a stream rehearses on the side
    is none. `cl.metrics.recurrence.revisit_curve` counts from the last practice of either kind.

    Returns: lag in experiences (1, 2, ...) -> forgetting, positive means worse. Pairs that were not evaluated are
        left out, and so are lags without any pair.
    Source: definition of this project, for streams in which domains re-occur.

    Example:
        >>> forgetting_by_lag(EvalTable.from_rows([[0.75, 0.0], [0.5, 1.0], [1.0, 0.5]], trained=[0, 1, 0]))
        {1: 0.375}
    """
    last_visit: dict[int, int] = {}
    by_lag: dict[int, list[float]] = {}
    for i, taught in enumerate(table.taught):
        last_visit.update(dict.fromkeys(np.flatnonzero(taught).tolist(), i))
        for j, visit in last_visit.items():
            forgotten = float(table.worsening(table.R[visit, j], table.R[i, j]))
            if i > visit and not math.isnan(forgotten):
                by_lag.setdefault(i - visit, []).append(forgotten)
    return {lag: mean(by_lag[lag]) for lag in sorted(by_lag)}


def diaz_rodriguez(table: EvalTable) -> dict[str, float]:
    """The variants that use the whole of R, for accuracies.

    A    = mean of R[i, j] over i >= v_j          BWT  = mean of R[i, j] - R[v_j, j] over i > v_j
    FWT' = mean of R[i, j] over i < v_j           REM  = 1 - |min(BWT, 0)|,  BWT+ = max(BWT, 0)

    Returns: keys `accuracy`, `bwt`, `bwt_plus`, `rem`, `fwt`.
    Raises: ValueError: the table holds losses (REM needs the range [0, 1]).
    Source: Diaz-Rodriguez et al. (2018), "Don't forget, there is more than forgetting".

    Example:
        >>> diaz_rodriguez(EvalTable.from_rows([[0.75, 0.25], [0.5, 1.0]]))
        {'accuracy': 0.75, 'bwt': -0.25, 'bwt_plus': 0.0, 'rem': 0.75, 'fwt': 0.25}
    """
    if table.measure != "accuracy":
        raise ValueError("the metrics of Diaz-Rodriguez et al. are defined for accuracies; this table holds losses")
    taught = table.first_visit < table.num_experiences
    visited, values = table.visited[:, taught], table.R[:, taught]
    since = np.arange(table.num_experiences)[:, None] > table.first_visit[taught]
    backward = mean((values - table.learned[taught])[since])
    return {
        "accuracy": mean(values[visited]),
        "bwt": backward,
        "bwt_plus": float(np.maximum(backward, 0)),
        "rem": float(1 + np.minimum(backward, 0)),
        "fwt": mean(values[~visited]),
    }
