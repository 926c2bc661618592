"""Runs in MLflow: flat, tagged, written in batches; and the replay of a run whose server was lost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl.core import UserError
from cl.result import Result
from cl.tracking.base import EVERY_STEPS, FLUSH_EVERY_S, Recorder, Stamped, first_line
from cl.tracking.check import check_store, hiding_password
from cl.tracking.journal import JOURNAL, read_journal
from cl.tracking.points import is_settled, points
from cl.tracking.store import absolute_uri, default_uri, prepare_store, store_of
from cl.tracking.stored_run import StoredRun, end_killed


class MLflowTracker(Recorder):
    """Log a run to MLflow.

    A fresh run is created at the start, and its id put into `result.mlflow_run_id`; a result that comes with an id is
    continued, without logging a parameter or a point twice. When the store fails, one warning is given, the run goes
    on unlogged, and `sync` completes it later from what is on disk.

    Args:
        uri: any tracking address; None takes the embedded store of the working directory, and for a run that goes on
            the one that holds it.
        experiment: name of the MLflow experiment, made when absent; the stream's name when None, since a chart that
            averages over different streams says nothing.
        run_dir: the run's folder, for artifacts and for the points of an earlier attempt (`Journal`).
        suite: id of the comparison that the run belongs to.
        every_steps, flush_every_s: as for `Recorder`.

    Cost: on the embedded store 5 ms per flush and 0.02 ms per point; a second at the start, to import mlflow.
    """

    # short experiences share a flush, whose price hardly depends on the number of points
    rest_s = 5.0

    def __init__(
        self,
        uri: str | None = None,
        *,
        experiment: str | None = None,
        run_dir: Path | None = None,
        suite: str = "",
        every_steps: int = EVERY_STEPS,
        flush_every_s: float = FLUSH_EVERY_S,
    ) -> None:
        super().__init__(every_steps, flush_every_s)
        self.uri, self.is_chosen = absolute_uri(uri or default_uri()), uri is not None
        self.experiment, self.suite = experiment, suite
        self.run_dir = None if run_dir is None else Path(run_dir)
        self._run: StoredRun | None = None

    @property
    def run_id(self) -> str | None:
        return self._run.id if self._run else None

    @property
    def experiment_id(self) -> str | None:
        """For `chart_url`."""
        return self._run.experiment_id if self._run else None

    def upload(self) -> None:
        """Send the files of the run's folder again; for figures and reports that were drawn after the run's end."""
        if self._run is not None and self.run_dir is not None:
            self._guard(self._run.upload, self.run_dir)

    def open(self, result: Result, settings: Mapping[str, Any]) -> None:
        if result.mlflow_run_id and self.run_dir and not self.is_chosen:
            self.uri = store_of(self.run_dir, result.mlflow_run_id)
        prepare_store(self.uri)
        if result.mlflow_run_id is None and (abandoned := self._attempt_before()):
            end_killed(self.uri, abandoned)
        self._run = StoredRun.open(self.uri, self.experiment, result, settings, self.suite)
        result.mlflow_run_id = self._run.id
        # a run that is killed never reaches its end, where the files are sent
        self._run.upload(self.run_dir)

    def _attempt_before(self) -> str | None:
        """Id of the run that was begun in this folder and killed before its first checkpoint."""
        journal = self.run_dir / JOURNAL if self.run_dir else None
        header = read_journal(journal)[0] if journal is not None and journal.exists() else {}
        return dict(header.get("result") or {}).get("mlflow_run_id")

    def rewind(self, steps: int | None, experiences: int) -> set[tuple[str, int]]:
        assert self._run is not None
        known = self._run.logged()
        journal = self.run_dir / JOURNAL if self.run_dir else None
        if steps != 0 and journal is not None and journal.exists():
            # what an earlier attempt could not flush before it was killed
            settled = [row for row in read_journal(journal)[1] if is_settled(row[0], steps, experiences)]
            self._run.log(_without(known, settled))
            known |= {(point.name, point.step) for point, _ in settled}
        return known

    def write(self, batch: Sequence[Stamped]) -> None:
        assert self._run is not None
        self._run.log(batch)

    def close(self, result: Result) -> None:
        assert self._run is not None
        self._run.finish(result)
        self._run.upload(self.run_dir, result)

    def lost(self, error: Exception) -> str:
        later = "without it"
        if self.run_dir is not None:
            later = f"and `cl report {self.run_dir} sync={self.uri}` completes the log"
        sentence = f"MLflow at {self.uri} was lost ({first_line(error)}); the run goes on, {later}"
        return hiding_password(sentence, self.uri)


def sync(run_dir: str | Path, uri: str | None = None, *, experiment: str | None = None) -> str:
    """Bring a run's folder into MLflow: create the run, or add what is missing to it. Doing it twice adds nothing.

    For runs that are over: one that did not finish is KILLED there.

    Args:
        experiment: name to use instead of the one in the journal.

    Returns:
        the id of the run in MLflow; also written into `result.json` when it holds none.

    Raises:
        UserError: the folder holds no run, or the store does not answer or refuses.
    """
    folder, uri = Path(run_dir), absolute_uri(uri or default_uri())
    journal, saved = folder / JOURNAL, folder / "result.json"
    header, rows = read_journal(journal) if journal.exists() else ({}, [])
    try:
        result = Result.load(saved) if saved.exists() else Result(**header["result"])
    except KeyError:
        raise UserError(f"{folder} is no run folder: it holds neither result.json nor {JOURNAL}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    check_store(uri)
    prepare_store(uri)
    moment = rows[-1][1] if rows else (saved if saved.exists() else journal).stat().st_mtime
    have = {(point.name, point.step) for point, _ in rows}
    rows += _without(have, [(point, moment) for point in points(result)])
    try:
        run = StoredRun.open(
            uri,
            experiment or header.get("experiment"),
            result,
            header.get("settings", {}),
            header.get("suite", ""),
            journal=header.get("journal", ""),
        )
        run.log(_without(run.logged(), rows))
        run.finish(result)
        run.upload(folder, result)
    except Exception as error:  # whatever a store raises, the user asked for this store
        sentence = f"MLflow at {uri} refused the run in {folder}: {first_line(error)}"
        raise UserError(hiding_password(sentence, uri)) from error
    if result.mlflow_run_id is None and saved.exists():
        result.mlflow_run_id = run.id
        written = saved.stat()
        result.save(saved)
        # a report takes the newest file of a seed for its newest run
        os.utime(saved, ns=(written.st_atime_ns, written.st_mtime_ns))
    return run.id


def _without(known: set[tuple[str, int]], rows: Sequence[Stamped]) -> list[Stamped]:
    return [row for row in rows if (row[0].name, row[0].step) not in known]
