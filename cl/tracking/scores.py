"""Scores of other benchmarks, measured on a run that exists: kept in its folder, and sent to its store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cl.core import UserError
from cl.result import Result
from cl.tracking.base import Stamped
from cl.tracking.journal import JOURNAL, line_of, read_journal
from cl.tracking.mlflow import sync
from cl.tracking.points import Point, defined, legal_name
from cl.tracking.store import default_uri, store_of

SECTION = "lm_eval/"


def score_points(scores: Mapping[str, Mapping[str, float]], experiences: int, remark: str = "") -> list[Point]:
    """Scores by task and metric as points, at the number of experiences that the model has finished.

    Args:
        remark: how they were taken, where that changes their value.

    Example:
        >>> score_points({"colours": {"acc": 0.5}}, 3, "num_fewshot_2")
        [Point(name='lm_eval/colours/num_fewshot_2/acc', value=0.5, step=3)]
    """
    places = {task: "/".join(part for part in (SECTION.rstrip("/"), task, remark) if part) for task in scores}
    return defined(
        Point(legal_name(f"{places[task]}/{metric}"), value, experiences)
        for task, values in scores.items()
        for metric, value in values.items()
    )


def keep_points(run_dir: Path, found: Iterable[Point]) -> int:
    """Add points to the journal of a run, where `sync` finds them; one that is there already stays as it is.

    Returns:
        how many were added.

    Raises:
        UserError: the run has no journal.
    """
    path = run_dir / JOURNAL
    if not path.exists():
        raise UserError(f"{run_dir} holds no {JOURNAL}, to which scores are added; is it the folder of a run?")
    known = {(point.name, point.step) for point, _ in read_journal(path)[1]}
    # a line that a crash cut short must not swallow the first score
    begin = "" if path.read_text().endswith("\n") else "\n"
    new: list[Stamped] = [(point, time.time()) for point in found if (point.name, point.step) not in known]
    with path.open("a") as file:
        file.write(begin + "".join(map(line_of, new)))
    return len(new)


def send(run_dir: Path, uri: str | None = None) -> str:
    """Complete the run in its store, if it has one; returns the sentence that says what happened.

    Args:
        uri: of the store that the run was logged to; None looks for the embedded one.
    """
    run_id = Result.load(run_dir / "result.json").mlflow_run_id
    if run_id is None:
        return f"the run is in no store; `cl report {run_dir} sync={uri or default_uri()}` puts it into one"
    uri = uri or store_of(run_dir, run_id)
    try:
        return f"in MLflow as {SECTION}... of run {sync(run_dir, uri)}"
    except UserError as error:
        return f"{error}; `cl report {run_dir} sync=URI` sends the scores later"
