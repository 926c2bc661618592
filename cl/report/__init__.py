"""What came out of a comparison: a page, figures, tables. Reads `result.json` and nothing else of a run.

write_report("runs/compare-1", "runs/compare-1/report")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cl.report.comparison import Estimate, Metric, StrategyRow, comparison_rows, metrics_of, table_text
from cl.report.load import Loaded, load_folder, load_results
from cl.result import Result, write_text

__all__ = [
    "Estimate",
    "Loaded",
    "Metric",
    "ReportPaths",
    "StrategyRow",
    "comparison_rows",
    "load_folder",
    "load_results",
    "metrics_of",
    "table_text",
    "write_report",
]

FILES = ".report.json"
"""Figures and tables of the last report in a folder, each with the hash of its bytes."""


MAX_TITLE = 80
"""Characters of all names up to which the title lists them."""


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report, and one sentence per thing that is wrong with its results."""

    html: Path
    markdown: Path
    figures: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def write_report(
    results_or_folder: Sequence[Result] | Path | str,
    out_dir: Path | str,
    *,
    title: str = "",
    reference: str = "naive",
    date: str = "",
) -> ReportPaths:
    """Write report.html, report.md, figures/*.png and tables/*.json.

    Runs on different streams or backbones come into sections of their own, with their figures and tables in a
    numbered folder each. Figures and tables of an earlier report in `out_dir` that this one does not have go, unless
    somebody changed them; whatever else lies there stays.

    Args:
        results_or_folder: runs, or the folder under which they lie.
        title: made from the streams and strategies when empty.
        reference: strategy that the others are compared with, where it has a finished run.
        date: as it is to be shown; none is shown when empty, so that a report made twice is the same file.

    Raises:
        ValueError: there is no result, or none that can be read.
    """
    # the page needs no matplotlib, and `cl --help` none of this
    from cl.report.curves import view
    from cl.report.figures import save_figures
    from cl.report.html import page
    from cl.report.load import sections
    from cl.report.markdown import markdown, save_tables
    from cl.report.style import looks

    if isinstance(results_or_folder, Path | str):
        loaded = load_folder(results_or_folder)
    else:
        loaded = Loaded(list(results_or_folder))
    results = loaded.results
    if not results:
        raise ValueError("there is no result to report on")
    out = Path(out_dir)
    palette = looks(result.label for result in results)
    views = [view(section, reference, palette) for section in sections(results)]
    title = title or _title(results)

    figures, tables = [], []
    for index, each in enumerate(views):
        own = f"{index + 1}_{each.section.stream}_{each.section.backbone}" if len(views) > 1 else ""
        own = "".join(c if c.isalnum() or c in "._-" else "_" for c in own)
        figures.append(save_figures(each, out / "figures" / own))
        tables += save_tables(each, out / "tables" / own)
    paths = ReportPaths(
        html=out / "report.html",
        markdown=out / "report.md",
        figures=[path for group in figures for path in group],
        tables=tables,
        warnings=[*loaded.warnings, *(warning for each in views for warning in each.section.warnings)],
    )
    links = [[path.relative_to(out).as_posix() for path in group] for group in figures]
    write_text(paths.markdown, markdown(views, title, date, loaded.warnings, links))
    write_text(paths.html, page(views, title, date, loaded.warnings))
    _remove_stale(out, [*paths.figures, *paths.tables])
    return paths


def _remove_stale(out: Path, written: Sequence[Path]) -> None:
    """Remove what an earlier report wrote, as long as it holds the same bytes, and this one did not write."""
    before: object = {}
    with suppress(OSError, ValueError):
        before = json.loads((out / FILES).read_text("utf-8"))
    old = before if isinstance(before, dict) else {}
    new = {path.relative_to(out).as_posix(): _digest(path) for path in written}
    # what to look at is said by the folder and not by the list, which anybody can write
    for path in [*out.glob("figures/**/*.png"), *out.glob("tables/**/*.json")]:
        name = path.relative_to(out).as_posix()
        if name in old and name not in new and old[name] == _digest(path):
            path.unlink()
            # a folder of a section goes with its last file
            with suppress(OSError):
                path.parent.rmdir()
    write_text(out / FILES, json.dumps(new, indent=1) + "\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _title(results: Sequence[Result]) -> str:
    streams = sorted({result.stream for result in results})
    labels = sorted({result.label for result in results})
    names = ", ".join(labels)
    if len(labels) > 6 or len(names) > MAX_TITLE:
        names = f"{len(labels)} strategies" if len(labels) > 1 else names
    return f"{names} on {', '.join(streams)}"
