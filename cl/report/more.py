"""The second table: numbers that only some comparisons have, or that only some readers ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cl import metrics
from cl.metrics.facilitation import period_of
from cl.report.comparison import NOT_CONTINUAL, Estimate, Metric, StrategyRow, estimate
from cl.report.load import Section, table_of
from cl.report.ranks import Ranks
from cl.report.style import UNITS, Unit

MIN_SEEDS_FOR_IQM = 4
"""A quarter of fewer runs is less than one, and the mean of all is in the main table."""

EXPONENT = Unit("Forgetting exponent", "", 1.0, 2, higher_is_better=False)
RANK = Unit("Average rank", "", 1.0, 2, higher_is_better=False)


@dataclass(frozen=True)
class Column:
    """One number of every strategy.

    Args:
        key: in the tables; that of `result.json` where it is a metric of a run.
        note: what it means, in one line.
        values: strategy -> estimate; a strategy without one is left out.
    """

    key: str
    title: str
    note: str
    unit: Unit
    values: Mapping[str, Estimate]

    @property
    def head(self) -> str:
        """Title with the unit."""
        return f"{self.title} ({self.unit.symbol})" if self.unit.symbol else self.title

    def get(self, label: str) -> Estimate:
        """Undefined where the strategy has none."""
        return self.values.get(label, Estimate())


def more_columns(section: Section, rows: Sequence[StrategyRow], ranks: Ranks | None) -> list[Column]:
    """The columns for which some strategy has a value."""
    unit = UNITS[section.measure]
    columns = [_interquartile(section, rows, unit)]
    if ranks:
        note = (
            f"rank by final {unit.name.lower()} among the strategies on the same seed, 1 is best, mean over seeds; "
            f"{NOT_CONTINUAL} takes no part"
        )
        average = {label: Estimate(mean) for label, mean in ranks.average.items()}
        columns.append(Column("average_rank", RANK.name, note, RANK, average))
    columns += _recurring(section, rows, unit)
    columns += _inside(section, rows, unit)
    return [column for column in columns if column.values]


def more_text(columns: Sequence[Column], rows: Sequence[StrategyRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells as text; strategies without any of the numbers are left out."""
    used = [row.strategy for row in rows if any(row.strategy in column.values for column in columns)]
    heads = ["Strategy", *(column.head for column in columns)]
    return heads, [[label, *(column.get(label).text(column.unit) for column in columns)] for label in used]


def metrics_inside(measure: str) -> tuple[Metric, ...]:
    """What evaluations inside experiences add; see `cl.metrics.stability`."""
    up = UNITS[measure].higher_is_better
    worst = "lowest" if up else "highest"
    return (
        Metric(
            "min_acc",
            "min-ACC" if up else "Worst loss",
            f"{worst} value of each domain after it was learned, inside experiences too, mean over the domains "
            "other than the last one taught",
            metrics.min_acc,
            1 if up else -1,
        ),
        Metric(
            "wc_acc",
            "WC-ACC" if up else "Worst-case loss",
            f"worst case: the last domain at the end and the others at their {worst}, mean over the domains learned",
            metrics.wc_acc,
            1 if up else -1,
        ),
        Metric(
            "stability_gap",
            "Stability gap",
            f"{'fall' if up else 'rise'} from the value before an experience to the {worst} inside it, mean over "
            "experiences and the domains learned before; positive means worse",
            metrics.stability_gap,
            -1,
        ),
    )


def _interquartile(section: Section, rows: Sequence[StrategyRow], unit: Unit) -> Column:
    values = {}
    for row in rows:
        finals = list(row.final.values.values())
        if len(finals) >= MIN_SEEDS_FOR_IQM:
            mean, (low, high) = metrics.interquartile_mean({section.stream: finals})
            values[row.strategy] = Estimate(mean, low, high)
    note = (
        f"mean final {unit.name.lower()} of the middle half of the seeds, so that one outlier does not move it; with "
        f"its 95 % bootstrap interval, from {MIN_SEEDS_FOR_IQM} seeds on"
    )
    return Column("iqm", "Interquartile mean", note, unit, values)


def _recurring(section: Section, rows: Sequence[StrategyRow], unit: Unit) -> list[Column]:
    """For streams in which domains come back; see `cl.metrics.recurrence`."""
    tables = {
        row.strategy: {run.seed: table for run in section.finished(row.strategy) if (table := table_of(run)).recurs}
        for row in rows
    }

    def of_all(metric: Callable[[metrics.EvalTable], float]) -> dict[str, Estimate]:
        found = {
            label: estimate({seed: metric(table) for seed, table in of_seeds.items()})
            for label, of_seeds in tables.items()
        }
        return {label: value for label, value in found.items() if value.is_defined}

    note = f"{unit.name.lower()} over all domains, mean over the last fifth of the experiences"
    law = (
        f"b of the power law value ~ lag^{'-' if unit.higher_is_better else ''}b, lag in experiences since a domain "
        "was last practised; larger forgets faster"
    )
    return [
        Column("late_average", "Late average", note, unit, of_all(metrics.late_average)),
        Column("retention_exponent", EXPONENT.name, law, EXPONENT, of_all(metrics.retention_exponent)),
    ]


def _inside(section: Section, rows: Sequence[StrategyRow], unit: Unit) -> list[Column]:
    tables = {
        row.strategy: {run.seed: table for run in section.finished(row.strategy) if (table := table_of(run)).within}
        for row in rows
    }
    periods = sorted({period_of(table) for of_seeds in tables.values() for table in of_seeds.values()} - {0})
    # these numbers depend on how often one looks
    grid = f"; evaluated every {' or '.join(map(str, periods))} steps" if periods else ""
    columns = []
    for metric in metrics_inside(section.measure):
        found = {
            label: estimate({seed: metric.of(table) for seed, table in of_seeds.items()})
            for label, of_seeds in tables.items()
        }
        known = {label: value for label, value in found.items() if not math.isnan(value.mean)}
        columns.append(Column(metric.key, metric.title, metric.note + grid, unit, known))
    return columns
