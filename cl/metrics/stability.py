"""What happens inside an experience: worst cases and the stability gap.

These need evaluations in the middle of experiences (`EvalTable.within`); without them they are NaN. Their values
depend on how dense those evaluations are: publish the grid (every n steps) with the number.

Notation as in `cl.metrics.forgetting`; A(j, n) = measure on domain j at evaluation n, c = the domain of the last
experience. For a loss "minimum" reads "highest loss".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from cl.metrics.forgetting import mean
from cl.metrics.matrix import EvalTable, FloatArray


def worst_since_first_visit(table: EvalTable) -> FloatArray:
    """[D], the worst value met after the end of the first visit; NaN for c, for unvisited domains, without `within`."""
    worst = np.full(table.num_domains, np.nan)
    first = table.first_visit
    for j in _others(table):
        inside = [p.value for p in table.within if p.domain == j and p.experience > first[j]]
        if inside:
            worst[j] = table.worst([*inside, *table.R[first[j] + 1 :, j]])
    return worst


def min_acc(table: EvalTable) -> float:
    """Worst case over the past, of the domains other than the current one.

    min-ACC = mean over visited j != c of min_{n after the end of j's first visit} A(j, n)

    Returns: unit of the measure. NaN when T = 1.
    Source: De Lange, van de Ven & Tuytelaars (2023). Differences: with revisits "earlier tasks" reads "visited
        domains other than the current one", so that `wc_acc` counts every domain once.

    Example:
        >>> dip = EvalTable.from_rows([[0.9, 0.1], [0.8, 0.7]], within=[(1, 10, 0, 0.5), (1, 20, 0, 0.75)])
        >>> min_acc(dip), wc_acc(dip)
        (0.5, 0.6)
    """
    return mean(worst_since_first_visit(table)[_others(table)])


def wc_acc(table: EvalTable) -> float:
    """Worst-case accuracy: the current domain now, the others at their worst.

    WC-ACC = 1/k A(c, now) + (1 - 1/k) min-ACC, with k visited domains

    Returns: unit of the measure; A(c, now) when T = 1. NaN when the last experience teaches no single domain.
    Source: De Lange, van de Ven & Tuytelaars (2023).
    """
    current = table.trained[-1] if table.trained else None
    if current is None:
        return math.nan
    now = float(table.last[current])
    num_others = len(_others(table))
    return (now + num_others * min_acc(table)) / (num_others + 1) if num_others else now


class Dip(NamedTuple):
    """One fall and return: domain j while experience `experience` taught something else.

    Args:
        experience, domain: where.
        gap: value before the experience minus the minimum inside it (negated for a loss); positive means worse.
        recovery: value at the end of the experience minus that minimum (negated for a loss).
    """

    experience: int
    domain: int
    gap: float
    recovery: float


def dips(table: EvalTable) -> list[Dip]:
    """Every pair of an experience and a domain visited before it that it does not teach itself.

    gap_{i,j} = R[i-1, j] - min_{n in i} A(j, n),  recovery_{i,j} = R[i, j] - min_{n in i} A(j, n)

    Source: definition of this project, after De Lange, van de Ven & Tuytelaars (2023).
    """
    inside: dict[tuple[int, int], list[float]] = {}
    for point in table.within:
        inside.setdefault((point.experience, point.domain), []).append(point.value)
    found = []
    for i in range(1, table.num_experiences):
        for j in np.flatnonzero(table.visited[i - 1]).tolist():
            if j == table.trained[i]:
                continue
            before, after = table.R[i - 1 : i + 1, j]
            lowest = table.worst([after, *inside[i, j]]) if (i, j) in inside else math.nan
            gap, recovery = table.worsening([before, after], lowest)
            found.append(Dip(i, j, float(gap), float(recovery)))
    return found


def stability_gap(table: EvalTable) -> float:
    """Mean `gap` over all `dips`: how deep old domains fall inside an experience, repaired or not.

    Example:
        >>> dip = EvalTable.from_rows([[1.0, 0.0], [0.75, 1.0]], within=[(1, 10, 0, 0.5)])
        >>> stability_gap(dip), recovery(dip)
        (0.5, 0.25)
    """
    return mean([dip.gap for dip in dips(table)])


def recovery(table: EvalTable) -> float:
    """Mean `recovery` over all `dips`: how much of the fall is repaired by the end of the experience."""
    return mean([dip.recovery for dip in dips(table)])


def _others(table: EvalTable) -> list[int]:
    """Visited domains other than the current one."""
    return [j for j in np.flatnonzero(table.first_visit < table.num_experiences).tolist() if j != table.trained[-1]]
