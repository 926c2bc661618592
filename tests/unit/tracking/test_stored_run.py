"""One run in a store, read back: its times, its files, its data set, and which run it is."""

import json

import pytest

from cl.result import Result
from cl.tracking import Journal, MLflowTracker, Point, config_hash, read_journal, sync
from cl.tracking.points import description

pytest.importorskip("mlflow")


def runs_of(client, experiment):
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def test_points_keep_their_time_and_files_their_names(store, client, make_result, tell, run_dir):
    result = make_result(status="failed", error="e" * 600)
    tell([Journal(run_dir, experiment="times")], result, last=1, status="failed")
    journal = run_dir / "metrics.jsonl"
    header, *lines = journal.read_text().splitlines()
    entries = [json.loads(line) | {"time": 1790000000.25 + k} for k, line in enumerate(lines)]
    journal.write_text("\n".join([header, *map(json.dumps, entries)]) + "\n")
    for name in ("tasks.json", "report.md", "notes.txt"):
        (run_dir / name).write_text("{}")
    for name in ("figures", "checkpoints"):
        (run_dir / name).mkdir()
        (run_dir / name / "file").write_text("x")
    result.save(run_dir / "result.json")
    run_id = sync(run_dir, store)
    (found,) = client.get_metric_history(run_id, "accuracy/task_00")
    told = {entry["name"]: entry["time"] for entry in entries}
    assert found.timestamp == round(told["accuracy/task_00"] * 1000)
    names = {file.path for file in client.list_artifacts(run_id)}
    assert names == {"config.yaml", "result.json", "tasks.json", "report.md", "figures", "tables"}
    assert [file.path for file in client.list_artifacts(run_id, "figures")] == ["figures/file"]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["cl.status"]) == ("FAILED", "failed")
    assert run.data.tags["mlflow.note.content"] == f"{'e' * 500}\n\n{description(result)}"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "tables/accuracy_matrix.json", "type": "table"}
    ]


def test_without_a_journal_points_have_the_time_of_the_result(store, client, make_result, tell, run_dir):
    result = make_result()
    tell([], result)
    result.save(run_dir / "result.json")
    moment = (run_dir / "result.json").stat().st_mtime
    run_id = sync(run_dir, store, experiment="without a journal")
    (found,) = client.get_metric_history(run_id, "final/bwt")
    assert found.timestamp == int(moment * 1000)
    assert [run.info.run_id for run in runs_of(client, "without a journal")] == [run_id]


def test_an_experiment_that_is_named_comes_before_that_of_the_journal(store, client, make_result, tell, run_dir):
    tell([Journal(run_dir, experiment="of the journal")], make_result())
    run_id = sync(run_dir, store, experiment="of the command")
    assert [run.info.run_id for run in runs_of(client, "of the command")] == [run_id]
    assert client.get_experiment_by_name("of the journal") is None


def test_the_data_set_is_known_by_the_settings_of_the_stream(store, client, make_result):
    """Runs that differ in nothing else share one, so that MLflow can filter by it."""
    settings = [
        {"seed": 0, "stream.size": 3, "stream": {"base": "x"}, "lr": 0.1, "streams": 1, "empty": {}},
        {"seed": 1, "stream.size": 3, "stream": {"base": "x"}, "lr": 0.2, "streams": 2, "empty": {}},
        {"seed": 0, "stream.size": 4, "stream": {"base": "x"}, "lr": 0.1, "streams": 1, "empty": {}},
    ]
    ids = []
    for each in settings:
        tracker = MLflowTracker(store, experiment="data")
        tracker.on_start(make_result(), each)
        ids.append(tracker.run_id)
    found = [client.get_run(run_id) for run_id in ids]
    digests = [run.inputs.dataset_inputs[0].dataset.digest for run in found]
    assert digests[0] == digests[1] != digests[2]
    assert found[0].data.params["stream.base"] == "x" and found[0].data.params["empty"] == "{}"
    assert [run.data.tags["cl.config_hash"] for run in found] == [config_hash(each) for each in settings]


def test_a_run_that_was_deleted_is_made_anew(store, client, make_result, tell, run_dir):
    result = make_result()
    tell([Journal(run_dir, experiment="deleted")], result)
    result.save(run_dir / "result.json")
    first = sync(run_dir, store)
    client.delete_run(first)
    second = sync(run_dir, store)
    assert second != first and [run.info.run_id for run in runs_of(client, "deleted")] == [second]
    assert Result.load(run_dir / "result.json").mlflow_run_id == first, "which run it was told to be stays"


def test_a_lost_store_says_how_to_complete_the_log_where_there_is_a_folder(run_dir):
    error = RuntimeError("gone")
    assert MLflowTracker("http://h:1").lost(error) == (
        "MLflow at http://h:1 was lost (gone); the run goes on, without it"
    )
    assert MLflowTracker("http://h:1", run_dir=run_dir).lost(error) == (
        "MLflow at http://h:1 was lost (gone); the run goes on, "
        f"and `cl report {run_dir} sync=http://h:1` completes the log"
    )


def test_a_fresh_run_takes_no_point_of_the_one_before_in_its_folder(store, client, make_result, tell, run_dir):
    tell([Journal(run_dir, every_steps=1)], make_result(), stop_at=5)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"name": "train/old", "value": 1.0, "step": 0, "time": 1.0}\n')
    assert (Point("train/old", 1.0, 0), 1.0) in read_journal(run_dir / "metrics.jsonl")[1]
    result = make_result()
    tell([MLflowTracker(store, experiment="fresh", run_dir=run_dir)], result)
    assert "train/old" not in client.get_run(result.mlflow_run_id).data.metrics
