"""What figures and page draw of a section, as numbers: every statistic is made here, the drawing adds none.

Shape legend: T experiences, D domains, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cl import metrics
from cl.metrics.matrix import BoolArray, FloatArray
from cl.report.comparison import NOT_CONTINUAL, StrategyRow, estimate, section_rows
from cl.report.load import Section, table_of
from cl.report.more import Column, more_columns
from cl.report.ranks import Ranks, rank
from cl.report.revisit import Revisit, retention
from cl.report.style import UNITS, Look, Unit, looks
from cl.report.tokens import ByTokens, by_tokens
from cl.report.within import Within, first_domains, inside
from cl.result import Result

MAX_BANDS = 12
"""Domains up to which every forgetting curve gets an interval, at the cost of a bootstrap per point."""


MAX_RAW = 60
"""Experiences up to which curves are drawn as they are; where domains come back, longer ones swing too fast to read."""


@dataclass(frozen=True)
class Cost:
    """A cost that performance is drawn against.

    Args:
        key: field of `StrategyRow`.
        base: of its prefixes, 1000 or 1024.
    """

    key: str
    title: str
    label: str
    base: int


COSTS = (
    Cost("passes", "Against work", "samples, forward + backward passes", 1000),
    Cost("buffer_bytes", "Against memory", "kept for past experiences", 1024),
)


@dataclass(frozen=True)
class Band:
    """A curve over experiences seen, mean over seeds with its 95 % interval.

    Args:
        x: [N] experiences seen, from 1; 0 is before training.
        mean, low, high: [N]; NaN where undefined.
    """

    x: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Matrix:
    """R, of one seed or averaged over seeds.

    Args:
        name: "mean of 5 seeds", "seed 3", with the status when it is not done.
        rows: [T] names.
        R: [T, D], NaN where not evaluated.
        seen: [T, D], whether the domain had been taught by then; where none ever is (joint), all count as taught.
        init: [D], the measure before training; NaN where not evaluated.
    """

    name: str
    rows: list[str]
    R: FloatArray
    seen: BoolArray
    init: FloatArray


@dataclass(frozen=True)
class StrategyView:
    """One strategy of a section.

    Args:
        runs: finished ones, or the partial ones where none finished.
        average: mean over the domains seen so far.
        is_bound: one row in R where others have T (joint), so drawn as a level across the figure.
        matrices: the mean over seeds first, then each seed.
        curves: [D] one per domain, of `matrices[0]`; empty band ends where bands are not drawn.
        fronts: cost keys for which no other strategy is both cheaper and better.
        within: the first domains inside experiences, where the runs were evaluated there.
        tokens: losses over tokens with the learning rate, for text.
        revisit: the measure against the time since last practice, where domains come back.
    """

    label: str
    look: Look
    row: StrategyRow
    runs: list[Result]
    average: Band
    is_bound: bool
    matrices: list[Matrix]
    curves: list[Band]
    fronts: frozenset[str] = frozenset()
    within: Within | None = None
    tokens: ByTokens | None = None
    revisit: Revisit | None = None


@dataclass(frozen=True)
class SectionView:
    """A section with everything computed.

    Args:
        strategies: in the order of the table, best first.
        ranks: None with too few strategies or seeds.
        more: columns of the second table.
        domains_within: columns of R that `StrategyView.within` has.
    """

    section: Section
    unit: Unit
    reference: str
    rows: list[StrategyRow]
    strategies: list[StrategyView] = field(default_factory=list)
    ranks: Ranks | None = None
    more: list[Column] = field(default_factory=list)
    domains_within: list[int] = field(default_factory=list)

    @property
    def num_experiences(self) -> int:
        """Rows of the longest R."""
        return max((len(view.average.x) for view in self.strategies), default=0)

    @property
    def smoothing(self) -> int:
        """Experiences that a point of a forgetting curve is the mean of; 1 draws the measure itself."""
        comes_back = any(view.revisit for view in self.strategies)
        return self.num_experiences // 20 if comes_back and self.num_experiences > MAX_RAW else 1

    def find(self, label: str) -> StrategyView | None:
        return next((view for view in self.strategies if view.label == label), None)


def view(section: Section, reference: str = "naive", palette: dict[str, Look] | None = None) -> SectionView:
    """Compute a section. Strategies of which no run got through an experience appear in `rows` only.

    Args:
        palette: of all sections of a report, so that a strategy keeps its colour; made from this section when None.
    """
    palette = palette or looks(section.labels)
    rows = section_rows(section, reference)
    fronts = _fronts(rows)
    runs = {row.strategy: section.shown(row.strategy) for row in rows}
    longest = max((len(result.R) for shown in runs.values() for result in shown), default=0)
    tables_of = {label: {result.seed: table_of(result) for result in shown} for label, shown in runs.items()}
    domains = first_domains(table for tables in tables_of.values() for table in tables.values())
    strategies = []
    for row in rows:
        shown, tables = runs[row.strategy], tables_of[row.strategy]
        if not shown:
            continue
        average = _average(tables)
        is_bound = len(average.x) == 1 < longest and all(len(result.experiences) == 1 for result in shown)
        strategies.append(
            StrategyView(
                label=row.strategy,
                look=palette[row.strategy],
                row=row,
                runs=shown,
                average=average,
                is_bound=is_bound,
                matrices=_matrices(shown, tables),
                curves=_domain_curves(tables, with_start=section.measure == "loss"),
                fronts=frozenset(cost for cost, names in fronts.items() if row.strategy in names),
                # in a single experience nothing can fall
                within=None if is_bound or longest < 2 else inside(shown, tables, domains),
                tokens=by_tokens(shown),
                revisit=retention(tables.values()),
            )
        )
    ranks = rank(rows)
    return SectionView(
        section=section,
        unit=UNITS[section.measure],
        reference=reference,
        rows=rows,
        strategies=strategies,
        ranks=ranks,
        more=more_columns(section, rows, ranks),
        domains_within=domains,
    )


def _fronts(rows: Sequence[StrategyRow]) -> dict[str, list[str]]:
    rivals = [row for row in rows if row.strategy != NOT_CONTINUAL and row.final.is_defined]
    return {
        cost: metrics.pareto_front(
            {row.strategy: (row.final.mean, getattr(row, cost)) for row in rivals},
            higher_is_better=UNITS[rivals[0].measure].higher_is_better if rivals else True,
        )
        for cost in (cost.key for cost in COSTS)
    }


def _average(tables: dict[int, metrics.EvalTable]) -> Band:
    averages = {seed: metrics.seen_average(table) for seed, table in tables.items()}
    longest = max(len(values) for values in averages.values())
    return _band(
        list(range(1, longest + 1)),
        [{seed: values[i] for seed, values in averages.items() if i < len(values)} for i in range(longest)],
    )


def _domain_curves(tables: dict[int, metrics.EvalTable], with_start: bool) -> list[Band]:
    """[D] the measure on each domain over experiences seen; a loss starts before training, where a model has some."""
    columns = {seed: np.vstack([table.R_init, table.R]) for seed, table in tables.items()}
    first = 0 if with_start and any(not np.isnan(values[0]).all() for values in columns.values()) else 1
    longest = max(len(values) for values in columns.values())
    x = list(range(first, longest))
    num_domains = next(iter(columns.values())).shape[1]
    curves = []
    for j in range(num_domains):
        points = [{seed: values[i, j] for seed, values in columns.items() if i < len(values)} for i in x]
        curves.append(_band(x, points, with_interval=num_domains <= MAX_BANDS))
    return curves


def _band(x: list[int], points: Sequence[dict[int, float]], with_interval: bool = True) -> Band:
    if with_interval:
        found = [estimate(values) for values in points]
        return Band(x, [e.mean for e in found], [e.low for e in found], [e.high for e in found])
    means = [_nanmean(list(values.values())) for values in points]
    return Band(x, means, [math.nan] * len(x), [math.nan] * len(x))


def _matrices(runs: Sequence[Result], tables: dict[int, metrics.EvalTable]) -> list[Matrix]:
    singles = [
        Matrix(
            name=f"seed {run.seed}" + ("" if run.status == "done" else f" ({run.status})"),
            rows=list(tables[run.seed].experiences),
            R=tables[run.seed].R,
            seen=tables[run.seed].seen,
            init=tables[run.seed].R_init,
        )
        for run in runs
    ]
    if len(singles) == 1:
        return singles
    longest = max(singles, key=lambda matrix: len(matrix.rows))
    mean = Matrix(
        name=f"mean of {len(singles)} seeds",
        rows=longest.rows,
        R=_mean_of([matrix.R for matrix in singles], longest.R.shape),
        # seeds may visit the domains in different orders
        seen=_mean_of([matrix.seen.astype(float) for matrix in singles], longest.R.shape) == 1,
        init=_mean_of([matrix.init[None] for matrix in singles], longest.init[None].shape)[0],
    )
    return [mean, *singles]


def _mean_of(arrays: Sequence[FloatArray], shape: tuple[int, ...]) -> FloatArray:
    """Mean over seeds of what was evaluated; a run that stopped early has fewer rows."""
    stack = np.full((len(arrays), *shape), np.nan)
    for layer, array in zip(stack, arrays, strict=True):
        layer[: len(array)] = array
    known = ~np.isnan(stack)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, stack, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _nanmean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
