"""The journal of a run: every point on disk, where it can be replayed into MLflow when a server was lost."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl.result import Result, write_text
from cl.tracking.base import EVERY_STEPS, FLUSH_EVERY_S, Recorder, Stamped
from cl.tracking.points import LAST_VALUES, Point, is_settled

if TYPE_CHECKING:
    from cl.state import TrainState

JOURNAL = "metrics.jsonl"


class Journal(Recorder):
    """Points as JSON lines in `RUN_DIR/metrics.jsonl`; what `sync` replays into MLflow when a server was lost.

    The first line describes the run (its settings, experiment and suite), each other line is one point:
    `{"name": "train/loss", "value": 0.5, "step": 50, "time": 1790000000.0}`. A run that is resumed drops the points
    that it is going to make again.

    Args:
        run_dir: the run's folder.
        experiment, suite: where a later `sync` puts the run; give the tracker's.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        experiment: str | None = None,
        suite: str = "",
        every_steps: int = EVERY_STEPS,
        flush_every_s: float = FLUSH_EVERY_S,
    ) -> None:
        super().__init__(every_steps, flush_every_s)
        self.path = Path(run_dir) / JOURNAL
        self.experiment, self.suite = experiment, suite
        self._settings: Mapping[str, Any] = {}

    def open(self, result: Result, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        # a run that is killed before its first checkpoint leaves word of what it was, too
        if not self.path.exists() or not read_journal(self.path)[1]:
            self._begin_file({}, [])

    def rewind(self, steps: int | None, experiences: int) -> set[tuple[str, int]]:
        header, rows = read_journal(self.path) if steps != 0 and self.path.exists() else ({}, [])
        kept = [row for row in rows if is_settled(row[0], steps, experiences)]
        self._begin_file(header, kept)
        return {(point.name, point.step) for point, _ in kept}

    def _begin_file(self, header: Mapping[str, Any], rows: Iterable[Stamped]) -> None:
        """The file anew: a description of this run, under the id of the journal that it goes on with, and rows."""
        assert self._result is not None
        identity = asdict(self._result) | {"R": [], "R_init": [], "within": [], "metrics": {}, "cost": {}}
        header = {
            "journal": header.get("journal") or uuid.uuid4().hex,
            "experiment": self.experiment,
            "suite": self.suite,
            "settings": self._settings,
            "result": identity,
        }
        write_text(self.path, json.dumps(header, default=str) + "\n" + "".join(map(line_of, rows)))

    def write(self, batch: Sequence[Stamped]) -> None:
        with self.path.open("a") as file:
            file.write("".join(map(line_of, batch)))

    def on_checkpoint(self, state: TrainState, path: str) -> None:
        # a checkpoint without the points before it would leave a gap after a crash
        self.flush()


def read_journal(path: Path) -> tuple[dict[str, Any], list[Stamped]]:
    """The description of the run ({} where it is damaged) and its points; a line cut short by a crash is skipped."""
    header: dict[str, Any] = {}
    rows: list[Stamped] = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            if "journal" in entry:
                header = entry
            else:
                rows.append((Point(entry["name"], float(entry["value"]), int(entry["step"])), float(entry["time"])))
        except (ValueError, KeyError, TypeError):
            continue
    return header, rows


def has_ended(run_dir: Path) -> bool:
    """Whether the trackers of a run that is done were told so: the journal, which is told last, has its last values.

    True of a run without a journal.
    """
    path = run_dir / JOURNAL
    return not path.exists() or any(point.name.startswith(LAST_VALUES) for point, _ in read_journal(path)[1])


def line_of(row: Stamped) -> str:
    """A point as the journal keeps it."""
    point, moment = row
    return json.dumps({"name": point.name, "value": point.value, "step": point.step, "time": round(moment, 3)}) + "\n"
