"""What happens inside an experience: worst cases and the stability gap.

These need evaluations in the middle of experiences (`EvalTable.within`); without them they are NaN. Their values
depend on how dense those evaluations are: publish the grid (every n steps) with the number.

Notation as in `cl.metrics.forgetting`; A(j, n) = measure on domain j at evaluation n, c = the domain of the last
experience. For a loss "minimum" reads "highest loss". Where the papers say "earlier tasks" we say "visited domains
other than the one being taught", so that a revisited domain is not at once current and past.
"""

from __future__ import annotations

import math

import numpy as np

from cl.metrics.forgetting import mean
from cl.metrics.matrix import BoolArray, EvalTable, FloatArray


def min_acc(table: EvalTable) -> float:
    """Worst case over the past, of the domains other than the current one.

    min-ACC = mean over visited j != c of min_{n after the end of j's first visit} A(j, n)

    Returns: unit of the measure. NaN when T = 1.
    Source: De Lange, van de Ven & Tuytelaars (2023).

    Example:
        >>> dip = EvalTable.from_rows([[0.9, 0.1], [0.8, 0.7]], within=[(1, 10, 0, 0.5), (1, 20, 0, 0.75)])
        >>> min_acc(dip), wc_acc(dip)
        (0.5, 0.6)
    """
    if table.num_experiences == 0:
        return math.nan
    past = np.arange(table.num_experiences)[:, None] > table.first_visit
    inside = np.where(past, _lowest_inside(table), np.nan)
    worst = table.worst(np.vstack([inside, np.where(past, table.R, np.nan)]))
    worst[np.isnan(inside).all(axis=0)] = np.nan
    return mean(worst[_bystanders(table)[-1]])


def wc_acc(table: EvalTable) -> float:
    """Worst-case accuracy: the current domain now, the others at their worst.

    WC-ACC = 1/k A(c, now) + (1 - 1/k) min-ACC, with k visited domains; where the last experience teaches several
    domains together, their values now count in place of the one, and min-ACC for the others

    Returns: unit of the measure; A(c, now) when no other domain was visited. NaN when the last experience teaches no
        evaluated domain.
    Source: De Lange, van de Ven & Tuytelaars (2023).
    """
    current = table.taught[-1] if table.num_experiences else np.zeros(0, dtype=bool)
    if not current.any():
        return math.nan
    now, num_now = mean(table.last[current]), int(np.count_nonzero(current))
    k = int(np.count_nonzero(table.visited[-1]))
    return now if k == num_now else (num_now * now + (k - num_now) * min_acc(table)) / k


def stability_gap(table: EvalTable) -> float:
    """How deep old domains fall inside an experience, whether or not they come back.

    mean over experiences i and domains j visited before i and not taught by it of R[i-1, j] - min_{n in i} A(j, n)

    Returns: unit of the measure; positive means worse. NaN when T = 1.
    Source: definition of this project, after De Lange, van de Ven & Tuytelaars (2023).

    Example:
        >>> dip = EvalTable.from_rows([[1.0, 0.0], [0.75, 1.0]], within=[(1, 10, 0, 0.5)])
        >>> stability_gap(dip), recovery(dip)
        (0.5, 0.25)
    """
    return mean(table.worsening(table.R[:-1], _lowest_inside(table)[1:])[_bystanders(table)[1:]])


def recovery(table: EvalTable) -> float:
    """How much of the fall is repaired by the end of the experience.

    mean over the pairs of `stability_gap` of R[i, j] - min_{n in i} A(j, n)

    Returns: unit of the measure; 0 or more.
    """
    return mean(table.worsening(table.R, _lowest_inside(table))[_bystanders(table)])


def _lowest_inside(table: EvalTable) -> FloatArray:
    """[T, D], worst value met during experience i, its end included; NaN without an evaluation inside it."""
    inside: dict[tuple[int, int], list[float]] = {}
    for point in table.within:
        inside.setdefault((point.experience, point.domain), []).append(point.value)
    lowest = np.full(table.R.shape, np.nan)
    for cell, values in inside.items():
        lowest[cell] = table.worst([table.R[cell], *values])
    return lowest


def _bystanders(table: EvalTable) -> BoolArray:
    """[T, D], the domains visited before experience i that it does not teach."""
    return table.visited & ~table.taught
