"""The main table: one row per strategy, as numbers. Terminal, Markdown and page write the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cl import metrics
from cl.metrics.statistics import ALPHA
from cl.report.load import Section, sections, table_of
from cl.report.style import UNITS, Unit, bytes_text, count_text, p_text
from cl.result import Result

NOT_CONTINUAL = "joint"
"""Sees all data at once, so it bounds the others and takes no part in ranks and in the trade against cost."""


@dataclass(frozen=True)
class Metric:
    """One scalar of a run, and how a table shows it.

    Args:
        key: in `result.json`.
        title: of the column.
        note: what it means, in one line.
        of: the run's table -> value; NaN where undefined.
        sign: 1 when a larger value is better, -1 when a smaller one is.
        is_change: a difference of two measures, so written with its sign.
    """

    key: str
    title: str
    note: str
    of: Callable[[metrics.EvalTable], float]
    sign: int
    is_change: bool = False


def metrics_of(measure: str) -> tuple[Metric, ...]:
    """The columns of the main table for a measure, with signs that say what is better."""
    up = 1 if UNITS[measure].higher_is_better else -1
    name = UNITS[measure].name.lower()
    lost = "best earlier value minus last" if up > 0 else "last value minus lowest before, initial value included"
    change = "negative means forgetting" if up > 0 else "positive means forgetting"
    return (
        Metric("final", f"Final {name}", "mean over all domains after the last experience", metrics.final, up),
        Metric(
            "average",
            f"Average {name}",
            "mean over experiences of the mean over the domains seen so far",
            metrics.average,
            up,
        ),
        Metric(
            "learning",
            f"Learning {name}",
            "mean over domains of the value right after a domain was first learned",
            metrics.learning,
            up,
        ),
        Metric(
            "forgetting_max",
            "Forgetting (max)",
            f"{lost}, mean over the domains learned before the last experience; positive means worse",
            metrics.forgetting_max,
            -1,
        ),
        Metric(
            "bwt",
            "BWT",
            "backward transfer: last value minus the value right after learning, mean over the domains learned before "
            f"the last experience; {change}",
            metrics.bwt,
            up,
            is_change=True,
        ),
    )


@dataclass(frozen=True)
class Estimate:
    """A metric over seeds.

    Args:
        mean: NaN where the metric is undefined.
        low, high: 95 % bootstrap interval of the mean; NaN with fewer than two seeds.
        values: seed -> value.
    """

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    values: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_defined(self) -> bool:
        return not math.isnan(self.mean)

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)

    def text(self, unit: Unit, signed: bool = False) -> str:
        """ "91.2 [90.8, 91.6]", or only the mean where there is no interval."""
        if not self.has_interval:
            return unit.text(self.mean, signed)
        return f"{unit.text(self.mean, signed)} [{unit.text(self.low, signed)}, {unit.text(self.high, signed)}]"


@dataclass(frozen=True)
class StrategyRow:
    """One strategy in the main table.

    Args:
        section: title of the section, for tables that hold several.
        seeds: of the finished runs.
        metrics: key of `Metric` -> estimate, in the order of the columns.
        difference: final measure minus the reference's, paired by seed; undefined for the reference itself.
        p_holm: Wilcoxon signed-rank, exact, adjusted by Holm over the strategies compared.
        num_pairs: seeds shared with the reference.
        test: the p value, or the sentence that says why there is none.
        is_significant: `p_holm` is below 0.05.
        passes: forwards plus backwards, in rows, mean over seeds; NaN when not recorded.
        buffer_bytes, train_s: mean over seeds.
        num_failed, num_interrupted: runs that no finished one replaces.
    """

    section: str
    measure: str
    strategy: str
    seeds: tuple[int, ...]
    metrics: Mapping[str, Estimate]
    is_reference: bool = False
    difference: Estimate = field(default_factory=Estimate)
    p_holm: float = math.nan
    num_pairs: int = 0
    test: str = ""
    is_significant: bool = False
    passes: float = math.nan
    buffer_bytes: float = math.nan
    train_s: float = math.nan
    num_failed: int = 0
    num_interrupted: int = 0

    @property
    def final(self) -> Estimate:
        return self.metrics["final"]


def comparison_rows(results: Sequence[Result], reference: str = "naive") -> list[StrategyRow]:
    """The main table of some runs, section by section, the best final measure first.

    Args:
        results: of one comparison, or of several; failed and interrupted runs are counted and not averaged.
        reference: strategy that the others are compared with; without a finished run of it there is no comparison.
    """
    return [row for section in sections(results) for row in section_rows(section, reference)]


def section_rows(section: Section, reference: str = "naive") -> list[StrategyRow]:
    """The rows of one section, the best final measure first and strategies without a finished run last."""
    runs = {label: section.finished(label) for label in section.labels}
    tables = {label: {result.seed: table_of(result) for result in runs[label]} for label in runs}
    columns = metrics_of(section.measure)
    values = {
        metric.key: {label: {seed: metric.of(table) for seed, table in tables[label].items()} for label in runs}
        for metric in columns
    }
    against_whom = reference if runs.get(reference) else None
    compared = {row.strategy: row for row in metrics.compare(values["final"], against_whom)}
    seeds_needed = metrics.seeds_needed(max(1, sum(row.num_pairs > 0 for row in compared.values())))
    unfinished = section.unfinished()
    rows = []
    for label, finished in runs.items():
        against = compared[label]
        rows.append(
            StrategyRow(
                section=section.title,
                measure=section.measure,
                strategy=label,
                seeds=tuple(result.seed for result in finished),
                metrics={metric.key: estimate(values[metric.key][label]) for metric in columns},
                is_reference=label == reference,
                difference=Estimate(against.difference, against.difference_low, against.difference_high),
                p_holm=against.p_holm,
                num_pairs=against.num_pairs,
                test=_test(against, seeds_needed),
                is_significant=against.p_holm <= ALPHA,
                passes=_mean_cost(finished, "forwards", "backwards"),
                buffer_bytes=_mean_cost(finished, "buffer_bytes"),
                train_s=_mean_cost(finished, "train_s"),
                num_failed=sum(r.status == "failed" for r in unfinished if r.label == label),
                num_interrupted=sum(r.status == "interrupted" for r in unfinished if r.label == label),
            )
        )
    sign = columns[0].sign
    return sorted(rows, key=lambda row: -sign * row.final.mean if row.final.is_defined else math.inf)


def table_text(rows: Sequence[StrategyRow], reference: str = "naive") -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the main table of one section as text; strategies without a finished run are left out."""
    rows = [row for row in rows if row.seeds]
    if not rows:
        return [], []
    unit, columns = UNITS[rows[0].measure], metrics_of(rows[0].measure)
    has_reference = any(row.difference.is_defined for row in rows)
    heads = ["Strategy", "Seeds", *(f"{metric.title} ({unit.symbol})" for metric in columns)]
    heads += [f"Difference to {reference}", "Test"] if has_reference else []
    heads += ["Work", "Kept"]
    cells = []
    for row in rows:
        line = [row.strategy, str(len(row.seeds))]
        line += [row.metrics[metric.key].text(unit, metric.is_change) for metric in columns]
        line += [row.difference.text(unit, signed=True), row.test or "–"] if has_reference else []
        cells.append([*line, count_text(row.passes), bytes_text(row.buffer_bytes)])
    return heads, cells


def estimate(values: Mapping[int, float]) -> Estimate:
    """Mean and 95 % interval over seeds; seeds without a value are left out."""
    defined = {seed: float(value) for seed, value in values.items() if not math.isnan(value)}
    sample = list(defined.values())
    return Estimate(math.fsum(sample) / len(sample), *metrics.bootstrap_ci(sample), defined) if defined else Estimate()


def _test(row: metrics.Row, seeds_needed: int) -> str:
    if row.num_pairs == 0:
        return "no seed in common" if row.num_seeds and row.verdict else ""
    # with fewer pairs than others a difference may be tested late, and be significant all the same
    if row.num_pairs < seeds_needed and not row.p_holm <= ALPHA:
        return f"too few seeds to test: {row.num_pairs}, needs {seeds_needed}"
    return f"p {p_text(row.p_holm)}"


def _mean_cost(runs: Sequence[Result], *keys: str) -> float:
    """Mean over the runs of the sum of some costs; NaN when no run recorded them all."""
    totals = [sum(run.cost[key] for key in keys) for run in runs if all(run.cost.get(key) is not None for key in keys)]
    return math.fsum(totals) / len(totals) if totals else math.nan
