"""What happens inside experiences, as numbers: the first domains over optimizer steps, where runs were evaluated there.

A result lists evaluations every so many steps of an experience, and not where experiences end; that follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cl.metrics.facilitation import period_of
from cl.metrics.matrix import EvalTable, FloatArray
from cl.result import Result

MAX_DOMAINS = 3
"""Domains drawn: the first ones have the most experiences in which to fall."""

# steps since the start of an experience (infinity: its end) -> step of the run, [D] measure
Course: TypeAlias = dict[float, tuple[float, FloatArray]]


@dataclass(frozen=True)
class Within:
    """The course of some domains through the experiences, mean over seeds.

    Args:
        steps: [N] optimizer steps; where seeds differ in the length of an experience, their mean.
        values: [K, N], one line per domain; NaN until every seed was taught it.
        is_end: [N], the point is the end of an experience, so its values are of R.
        period: steps between evaluations; 0 where it is unknown.
        num_seeds: with evaluations inside experiences.
    """

    steps: list[float]
    values: FloatArray
    is_end: list[bool]
    period: int
    num_seeds: int

    @property
    def ends(self) -> list[float]:
        """Steps at which experiences end, as far as they are known."""
        return [step for step, is_end in zip(self.steps, self.is_end, strict=True) if is_end]


def first_domains(tables: Iterable[EvalTable]) -> list[int]:
    """The columns of R to draw: of those that were evaluated inside experiences, the ones taught first."""
    used = [table for table in tables if table.within]
    if not used:
        return []
    evaluated = {point.domain for table in used for point in table.within if table.seen[point.experience, point.domain]}
    visits = np.mean([table.first_visit for table in used], axis=0)
    return sorted(evaluated, key=lambda j: (visits[j], j))[:MAX_DOMAINS]


def inside(runs: Sequence[Result], tables: Mapping[int, EvalTable], domains: Sequence[int]) -> Within | None:
    """The course of `domains` in the runs of one strategy; None where no run was evaluated inside experiences.

    Seeds are averaged at the same number of steps since the start of the same experience, where all of them have one.
    """
    used = [run for run in runs if tables[run.seed].within]
    if not used or not domains:
        return None
    courses = [_courses(run, tables[run.seed]) for run in used]
    steps, values, is_end = [], [], []
    # a run that stopped early has fewer experiences
    for of_seeds in zip(*courses, strict=False):
        for key in sorted(set.intersection(*(set(course) for course in of_seeds))):
            steps.append(math.fsum(course[key][0] for course in of_seeds) / len(of_seeds))
            values.append(np.mean([course[key][1] for course in of_seeds], axis=0)[list(domains)])
            is_end.append(math.isinf(key))
    if not steps:
        return None
    periods = {period_of(tables[run.seed]) for run in used}
    return Within(steps, np.array(values).T, is_end, periods.pop() if len(periods) == 1 else 0, len(used))


def _courses(run: Result, table: EvalTable) -> list[Course]:
    """One course per experience, with the row of R at its end where that step is known."""
    seen, period = table.seen, period_of(table)
    rows: list[dict[int, FloatArray]] = [{} for _ in range(table.num_experiences)]
    for point in table.within:
        row = rows[point.experience].setdefault(point.step, np.full(table.num_domains, math.nan))
        if seen[point.experience, point.domain]:
            row[point.domain] = point.value
    # the first evaluation comes one period after the start, which is the end of the experience before
    starts = [min(row) - period if row and period else math.nan for row in rows]
    last = run.cost.get("updates") if run.status == "done" else None
    ends = [*starts[1:], math.nan if last is None else float(last)]
    courses = []
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        start = min(row, default=0) - period
        course: Course = {step - start: (float(step), values) for step, values in row.items()}
        # an end before the last evaluation: they did not come in even steps, and nothing follows from them
        if end > max(row, default=0):
            course[math.inf] = (end, np.where(seen[i], table.R[i], math.nan))
        courses.append(course)
    return courses
