"""Forward facilitation: whether later experiences are learnt in fewer steps than the first one.

These need evaluations in the middle of experiences (`EvalTable.within`); their resolution is the step between two of
them: publish the grid (every n steps) with the number.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from cl.metrics.forgetting import mean
from cl.metrics.matrix import EvalTable, WithinPoint

LEVEL = 0.8
"""Accuracy that counts as learnt."""


def period_of(table: EvalTable) -> int:
    """Steps between evaluations inside experiences; 0 where it cannot be told.

    Example:
        >>> period_of(EvalTable.from_rows([[0.9, 0.1], [0.8, 0.7]], within=[(0, 20, 0, 0.5), (1, 70, 0, 0.6)]))
        20
    """
    steps = [sorted({p.step for p in points}) for points in _by_experience(table)]
    if steps and steps[0]:
        return steps[0][0]
    return min((b - a for each in steps for a, b in pairwise(each)), default=0)


def steps_to_reach(table: EvalTable, level: float = LEVEL) -> dict[int, float]:
    """Optimizer steps from the start of each experience until its own domain is as good as `level`.

    s_i = min {n: A(c_i, n) reaches level, n steps into experience i}, at the first visit of its domain c_i

    A domain that gets there only at the end of its experience counts the step after the last evaluation inside it,
    which is the least that it can have been.

    Returns: experience -> steps; infinite where the level was not reached. Experiences that teach no single new domain
        or were not evaluated inside are left out; all are where `period_of` cannot be told, since the first was not
        evaluated inside and no other one twice.
    Source: trials to criterion of Davidson & Mozer, "Sequential mastery of multiple visual tasks", CVPR 2020; the
        measure that Gandhi et al. (2024) call forward facilitation.

    Example:
        >>> courses = [(0, 10, 0, 0.5), (0, 20, 0, 0.75), (1, 40, 1, 0.75)]
        >>> steps_to_reach(EvalTable.from_rows([[1.0, 0.0], [1.0, 1.0]], within=courses), level=0.75)
        {0: 20.0, 1: 10.0}
    """
    period, first = period_of(table), table.first_visit
    found: dict[int, float] = {}
    for i, (domain, points) in enumerate(zip(table.trained, _by_experience(table), strict=True)):
        course = sorted((p.step, p.value) for p in points if p.domain == domain)
        if domain is None or first[domain] != i or not course or not period:
            continue
        # the first evaluation comes one period after the start
        start = min(p.step for p in points) - period
        course.append((course[-1][0] + 1, float(table.R[i, domain])))
        reached = (step for step, value in course if _is_reached(table, value, level))
        found[i] = float(next(reached, math.inf) - start)
    return found


def forward_facilitation(table: EvalTable, level: float = LEVEL) -> float:
    """How many times as fast later experiences reach `level` as the first one.

    F = s_first / mean of s_i over the later experiences, s of `steps_to_reach`

    Returns: above 1 the past helps, below 1 it is in the way; 0 when a later experience never gets there. NaN without
        evaluations inside the first experience and a later one, when the first never gets there, and for a loss.

    Example:
        >>> courses = [(0, 10, 0, 0.5), (0, 20, 0, 0.75), (1, 40, 1, 0.75)]
        >>> forward_facilitation(EvalTable.from_rows([[1.0, 0.0], [1.0, 1.0]], within=courses), level=0.75)
        2.0
    """
    steps = steps_to_reach(table, level) if table.measure == "accuracy" else {}
    later = [value for i, value in steps.items() if i > 0]
    if not math.isfinite(steps.get(0, math.inf)):
        return math.nan
    return steps[0] / mean(later)


def _by_experience(table: EvalTable) -> list[list[WithinPoint]]:
    """[T] the evaluations inside each experience."""
    points: list[list[WithinPoint]] = [[] for _ in range(table.num_experiences)]
    for point in table.within:
        points[point.experience].append(point)
    return points


def _is_reached(table: EvalTable, value: float, level: float) -> bool:
    return bool(np.isfinite(value)) and (value >= level if table.measure == "accuracy" else value <= level)
