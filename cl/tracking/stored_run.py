"""One run in an MLflow store: finding or creating it, and writing to it. Every call may raise what mlflow raises."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cl import __version__
from cl.result import Result
from cl.tracking.base import Stamped
from cl.tracking.charts import grouped_view, view_tag
from cl.tracking.points import config_hash, description, legal_name, matrix_table
from cl.tracking.store import artifact_location, patient_uri, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
VALUE_LENGTH = 500
"""Of a parameter; what old servers accept, too. The whole value is in the artifact config.yaml."""

ARTIFACTS = ("config.yaml", "result.json", "tasks.json", "report.md", "figures", "tables")
STATUS = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
JOURNAL_TAG = "cl.journal"
NOTE_TAG = "mlflow.note.content"
"""The description on the run's page."""

T = TypeVar("T")


@dataclass
class StoredRun:
    """One run in a store.

    Args:
        is_new: created by this process, so that nothing can have been logged before.
    """

    client: MlflowClient
    experiment_id: str
    id: str
    is_new: bool

    @classmethod
    def open(
        cls,
        uri: str,
        experiment: str | None,
        result: Result,
        settings: Mapping[str, Any],
        suite: str,
        journal: str = "",
    ) -> StoredRun:
        """Find the run of `result`, by its id or by its journal, or create it.

        Args:
            experiment: name of the experiment; the stream's name when None.
        """
        quiet()
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=patient_uri(uri))
        name = experiment or result.stream
        experiment_id = _experiment_id(client, name, artifact_location(uri), suite, result.measure)
        found = _find(client, experiment_id, result.mlflow_run_id, journal)
        if found is not None:
            client.update_run(found.info.run_id, status="RUNNING")
            client.set_tag(found.info.run_id, "cl.status", "running")
            return cls(client, found.info.experiment_id, found.info.run_id, is_new=False)
        tags = {
            "cl.strategy": result.label,
            "cl.stream": result.stream,
            "cl.backbone": result.backbone,
            "cl.setting": result.setting,
            "cl.suite": suite,
            "cl.config_hash": config_hash(settings),
            "cl.version": __version__,
            "cl.status": "running",
            JOURNAL_TAG: journal,
            NOTE_TAG: description(result),
        }
        name = f"{result.label}-s{result.seed}"
        created = client.create_run(experiment_id, run_name=name, tags={key: tag for key, tag in tags.items() if tag})
        run = cls(client, experiment_id, created.info.run_id, is_new=True)
        run._describe(result, settings)
        return run

    def logged(self) -> set[tuple[str, int]]:
        """(name, step) of every point in the store; MLflow appends a repeated step, which doubles the curve."""
        if self.is_new:
            return set()
        names = self.client.get_run(self.id).data.metrics
        return {(name, point.step) for name in names for point in self.client.get_metric_history(self.id, name)}

    def log(self, batch: Sequence[Stamped]) -> None:
        from mlflow.entities import Metric

        for chunk in _chunks(batch, METRICS_PER_CALL):
            metrics = [Metric(p.name, p.value, int(moment * 1000), p.step) for p, moment in chunk]
            self.client.log_batch(self.id, metrics=metrics)

    def finish(self, result: Result) -> None:
        from mlflow.entities import RunTag

        tags = {
            "cl.status": result.status,
            NOTE_TAG: "\n\n".join(filter(None, [result.error[:VALUE_LENGTH], description(result)])),
            # what log_table sets besides, so that the viewer shows a table; log_table itself appends at a second call
            "mlflow.loggedArtifacts": json.dumps([{"path": _table_path(result), "type": "table"}]),
        }
        self.client.log_batch(self.id, tags=[RunTag(name, text) for name, text in tags.items()])
        self.client.set_terminated(self.id, STATUS.get(result.status, "FAILED"))

    def upload(self, folder: Path | None, result: Result | None = None) -> None:
        """Send the files of the run's folder, and R as a table; before the run's end there is only the config."""
        if result is not None:
            self.client.log_text(self.id, json.dumps(matrix_table(result)), _table_path(result))
        for file in [folder / name for name in ARTIFACTS] if folder else ():
            if file.is_file():
                self.client.log_artifact(self.id, str(file))
            elif file.is_dir():
                self.client.log_artifacts(self.id, str(file), artifact_path=file.name)

    def _describe(self, result: Result, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, Param

        values = {"seed": result.seed} | dict(_flat(settings))
        params = [Param(legal_name(name), _short(str(value))) for name, value in values.items()]
        for chunk in _chunks(params, PARAMS_PER_CALL):
            self.client.log_batch(self.id, params=chunk)
        of_stream = {name: value for name, value in values.items() if name.split(".")[0] == "stream"}
        dataset = Dataset(result.stream, config_hash(of_stream), source_type="local", source=result.stream)
        _beside_others(self.client.log_inputs, self.id, [DatasetInput(dataset)])


def end_killed(uri: str, run_id: str) -> None:
    """Say of a run that nothing goes on with that it was killed, where the store holds it as running."""
    quiet()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=patient_uri(uri))
    found = _find(client, "", run_id, "")
    if found is not None and found.info.status == "RUNNING":
        client.set_tag(run_id, "cl.status", "interrupted")
        client.set_terminated(run_id, STATUS["interrupted"])


def _experiment_id(client: MlflowClient, name: str, location: str | None, suite: str, measure: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            experiment = client.get_experiment(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # a run beside this one made it in between, or it really cannot be made
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    for view in dict.fromkeys(("", suite)):
        if view_tag(view) not in experiment.tags:
            content = grouped_view(view, measure)
            _beside_others(client.set_experiment_tag, experiment.experiment_id, view_tag(view), content)
    return experiment.experiment_id


def _beside_others(write: Callable[..., Any], *details: Any) -> None:
    """Write a row that runs share: when two insert it at once, MLflow refuses the later, which then finds it there."""
    from mlflow.exceptions import MlflowException

    try:
        write(*details)
    except MlflowException:
        write(*details)


def _find(client: MlflowClient, experiment_id: str, run_id: str | None, journal: str) -> Any:
    """The run with this id; else the one that an earlier `sync` of this journal made; else None."""
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                return run
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    if journal:
        found = client.search_runs([experiment_id], f"tags.`{JOURNAL_TAG}` = '{journal}'", max_results=1)
        return found[0] if found else None
    return None


def _table_path(result: Result) -> str:
    return f"tables/{result.measure}_matrix.json"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: str) -> str:
    return value if len(value) <= VALUE_LENGTH else value[: VALUE_LENGTH - 3] + "..."


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[low : low + size] for low in range(0, len(items), size))
