"""The report as Markdown, and its numbers as tables: for the tracking server, papers and other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl.report.comparison import StrategyRow, table_text
from cl.report.curves import SectionView
from cl.report.load import table_of
from cl.report.more import more_text
from cl.report.words import facts, glossaries, headline, unfinished
from cl.result import write_text


def markdown(
    views: Sequence[SectionView],
    title: str,
    date: str = "",
    warnings: Sequence[str] = (),
    figures: Sequence[Sequence[str]] = (),
) -> str:
    """The report without its charts.

    Args:
        figures: of each view, paths relative to the file.
    """
    lines = [f"# {_plain(title)}", ""]
    lines += [_plain(date), ""] if date else []
    for view, paths in zip(views, figures or [()] * len(views), strict=True):
        section = view.section
        lines += [f"## {_plain(section.title)}", ""] if len(views) > 1 else []
        lines += [f"- {name}: {_plain(value)}" for name, value in facts(section)] + [""]
        lines += [_plain(headline(view)), ""] if headline(view) else []
        lines += [*main_table(view.rows, view.reference), ""]
        lines += [*_text_table(*more_text(view.more, view.rows)), ""] if view.more else []
        lines += [_plain(view.ranks.sentence), ""] if view.ranks else []
        missing = [f"- {_plain(run)}: {_plain(why)}" for run, why in unfinished(section)]
        lines += ["Not in the table:", "", *missing, ""] if missing else []
        lines += [f"![{Path(path).stem.replace('_', ' ')}]({path})" for path in paths]
        lines += [""]
    lines += [*(f"- **{_plain(name)}**: {_plain(note)}" for name, note in glossaries(views)), ""]
    notes = [*warnings, *(warning for view in views for warning in view.section.warnings)]
    lines += ["Warnings:", "", *(f"- {_plain(note)}" for note in notes)] if notes else []
    return "\n".join(lines).rstrip() + "\n"


def main_table(rows: Sequence[StrategyRow], reference: str = "naive") -> list[str]:
    """The rows of one section as lines of a Markdown table."""
    return _text_table(*table_text(rows, reference))


def _text_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [map(_plain, heads), ["---", *["---:"] * (len(heads) - 1)], *(map(_plain, line) for line in cells)]
    return [f"| {' | '.join(line)} |" for line in lines] if cells else []


def save_tables(view: SectionView, folder: Path) -> list[Path]:
    """Write the numbers in long form, one value per row and no row without one; MLflow shows such files as tables."""
    tables = {
        view.unit.matrix: (("strategy", "seed", "after", "experience", "domain", "value"), _matrix_rows(view)),
        "seen_average": (("strategy", "seed", "experiences_seen", "value"), _average_rows(view)),
        "comparison": (("strategy", "metric", "quantity", "value"), _comparison_rows(view)),
        "seeds": (("strategy", "metric", "seed", "value"), _seed_rows(view)),
    }
    if any(strategy.within for strategy in view.strategies):
        columns = ("strategy", "seed", "experience", "step", "domain", "value")
        tables["within"] = (columns, _within_rows(view))
    if any(strategy.revisit for strategy in view.strategies):
        tables["revisit"] = (("strategy", "lag", "pairs", "value"), _revisit_rows(view))
    paths = []
    for name, (columns, rows) in tables.items():
        data = [row for row in rows if not math.isnan(row[-1])]
        paths.append(folder / f"{name}.json")
        content = {"columns": columns, "data": data}
        write_text(paths[-1], json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")
    return paths


def _matrix_rows(view: SectionView) -> Iterable[tuple[Any, ...]]:
    """`after` counts experiences; 0 is before training."""
    for strategy in view.strategies:
        for run in strategy.runs:
            table = table_of(run)
            for j, domain in enumerate(table.domains):
                yield strategy.label, run.seed, 0, "", domain, float(table.R_init[j])
                for i, experience in enumerate(table.experiences):
                    yield strategy.label, run.seed, i + 1, experience, domain, float(table.R[i, j])


def _average_rows(view: SectionView) -> Iterable[tuple[Any, ...]]:
    from cl.metrics import seen_average

    for strategy in view.strategies:
        for run in strategy.runs:
            for i, value in enumerate(seen_average(table_of(run))):
                yield strategy.label, run.seed, i + 1, float(value)


def _comparison_rows(view: SectionView) -> Iterable[tuple[Any, ...]]:
    for row in view.rows:
        estimates = [*row.metrics.items(), (f"final_minus_{view.reference}", row.difference)]
        for key, found in estimates:
            for quantity in ("mean", "low", "high"):
                yield row.strategy, key, quantity, getattr(found, quantity)
        yield row.strategy, f"final_minus_{view.reference}", "p_holm", row.p_holm
        for key in ("passes", "buffer_bytes", "train_s"):
            yield row.strategy, key, "mean", getattr(row, key)
    for column in view.more:
        for label, found in column.values.items():
            for quantity in ("mean", "low", "high"):
                yield label, column.key, quantity, getattr(found, quantity)
    if view.ranks:
        for label in view.ranks.average:
            yield label, "average_rank", "critical_difference", view.ranks.critical_difference
            yield label, "average_rank", "friedman_p", view.ranks.friedman_p


def _seed_rows(view: SectionView) -> Iterable[tuple[Any, ...]]:
    for row in view.rows:
        for key, found in row.metrics.items():
            for seed, value in found.values.items():
                yield row.strategy, key, seed, value
    for column in view.more:
        for label, found in column.values.items():
            for seed, value in found.values.items():
                yield label, column.key, seed, value


def _within_rows(view: SectionView) -> Iterable[tuple[Any, ...]]:
    """`experience` is the number of the one going on, from 0; `after` of the other table counts those that ended."""
    for strategy in view.strategies:
        for run in strategy.runs:
            table = table_of(run)
            for point in table.within:
                domain = table.domains[point.domain]
                yield strategy.label, run.seed, point.experience, point.step, domain, point.value


def _revisit_rows(view: SectionView) -> Iterable[tuple[Any, ...]]:
    """`lag` counts experiences since the last practice; the points of the figure, over all seeds."""
    for strategy in view.strategies:
        if found := strategy.revisit:
            yield from (
                (strategy.label, int(lag), int(count), float(value))
                for lag, count, value in zip(found.lag, found.count, found.value, strict=True)
            )


def _plain(text: str) -> str:
    """Text that Markdown reads as text: names and error messages come from users."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
