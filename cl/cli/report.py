"""Write the report of a folder: one self-contained HTML page, figures, tables, from the results on disk.

Usage: cl report DIR [out=DIR] [reference=naive] [sync=URI]

  cl report runs/compare/permuted_digits-1a2b3c4d
  cl report RUN_DIR                          one run
  cl report DIR sync=sqlite:///mlruns.db     also complete MLflow from the journals, after its server was lost
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl.cli.console import ui_command
from cl.core import UserError
from cl.report import StrategyRow, comparison_rows, load_results, write_report
from cl.report.load import RESULT_FILE, is_copy
from cl.report.style import UNITS
from cl.result import Result


def main(words: list[str]) -> int:
    """Report on one folder."""
    from cl.cli.folder import check_writable

    options = {"out": "", "reference": "", "sync": ""}
    folders = [word for word in words if "=" not in word]
    for word in words:
        name, _, value = word.partition("=")
        if "=" in word and name not in options:
            raise UserError(f"{word!r} is no option of `cl report`; its options are {', '.join(options)}")
        if "=" in word:
            options[name] = value
    if len(folders) != 1:
        raise UserError(f"`cl report` takes one folder, got {len(folders)}: {' '.join(folders) or 'none'}")
    folder, console = Path(folders[0]), Console(markup=False)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    out, asked = Path(options["out"]) if options["out"] else None, options["reference"]
    check_writable(out or folder / "report")
    if options["sync"]:
        _sync(folder, options["sync"], console)
    report_on(folder, console, asked or "naive", out, must_exist=bool(asked), uri=options["sync"])
    return 0


def report_on(
    folder: Path,
    console: Console,
    reference: str = "naive",
    out: Path | None = None,
    *,
    must_exist: bool = False,
    uri: str = "",
) -> None:
    """Write the report of a folder into it, and print its main table.

    Args:
        must_exist: refuse a reference that is none of the strategies, instead of comparing with none.
        uri: of the store that holds the runs; empty takes the one of their configs.
    """
    try:
        results = load_results(folder)
    except ValueError as error:
        raise UserError(str(error)) from None
    if must_exist and reference not in (known := sorted({result.label for result in results})):
        raise UserError(f"reference is {reference!r}; it must be one of {', '.join(known)}")
    paths = write_report(folder, out or folder / "report", reference=reference, date=str(date.today()))
    rows = comparison_rows(results, reference)
    for section in dict.fromkeys(row.section for row in rows):
        console.print(comparison_table(section, [row for row in rows if row.section == section]))
    for warning in paths.warnings:
        console.print(Text.assemble(("note", "yellow"), f" {warning}"))
    console.print(f"report: {paths.html}", highlight=False, soft_wrap=True)
    for run_dir, result in _readable(folder):
        if result.mlflow_run_id:
            command = ui_command(run_dir, result.mlflow_run_id, uri or _named_store(run_dir))
            console.print(f"forgetting curves in MLflow: `{command}`", highlight=False, soft_wrap=True)
            break


def comparison_table(title: str, rows: list[StrategyRow]) -> Table:
    """A strategy per line, narrow enough for a terminal; the report has every column with its interval."""
    unit = UNITS[rows[0].measure]
    reference = next((row.strategy for row in rows if row.is_reference), "")
    # a comparison with nothing, as in a sweep of one strategy, has no columns
    is_compared = any(row.difference.is_defined for row in rows)
    notes = dict.fromkeys(row.test for row in rows if row.test and not row.test.startswith("p "))
    table = Table(
        title=f"{title}, {unit.symbol}, mean over seeds [95 % interval]",
        caption="; ".join(notes),
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    # where the terminal is narrow, names give way and no number is cut
    table.add_column("strategy", overflow="fold")
    for name in ("seeds", "final", "forgetting", *([f"final - {reference}", "Holm p"] if is_compared else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        forgetting = unit.text(row.metrics["forgetting_max"].mean)
        cells = [row.strategy, str(len(row.seeds)), row.final.text(unit), forgetting]
        difference = row.difference.text(unit, signed=True) if row.difference.is_defined else ""
        p_value = "" if math.isnan(row.p_holm) else f"{row.p_holm:.3f}"
        table.add_row(*cells, *([difference, p_value] if is_compared else []))
    return table


def _sync(folder: Path, uri: str, console: Console) -> None:
    """Bring every run of the folder that is over into MLflow."""
    from cl.cli.lock import is_going_on
    from cl.tracking import sync
    from cl.tracking.check import without_password
    from cl.tracking.journal import JOURNAL, read_journal

    run_dirs = [run_dir for run_dir, _ in _readable(folder)]
    # killed before the first checkpoint, when there is no result yet
    begun = [path for path in sorted(folder.rglob(JOURNAL)) if not path.with_name(RESULT_FILE).exists()]
    run_dirs += [path.parent for path in begun if "result" in read_journal(path)[0]]
    for run_dir in [each for each in run_dirs if is_going_on(each)]:
        console.print(f"{run_dir} is still going on and left out of the sync", highlight=False, soft_wrap=True)
        run_dirs.remove(run_dir)
    for run_dir in run_dirs:
        sync(run_dir, uri)
    console.print(f"{len(run_dirs)} runs are in {without_password(uri)}", highlight=False)


def _readable(folder: Path) -> Iterator[tuple[Path, Result]]:
    """Folder and result of each run that can be read; of the others the report says what is wrong."""
    for path in sorted(folder.rglob(RESULT_FILE)):
        if not is_copy(path):
            with suppress(ValueError, OSError):
                yield path.parent, Result.load(path)


def _named_store(run_dir: Path) -> str | None:
    """Address of the store that a run was told to use."""
    from cl.cli.folder import saved_config

    with suppress(UserError):
        return (saved_config(run_dir).get("tracking") or {}).get("uri")
    return None
