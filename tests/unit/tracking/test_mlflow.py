"""What arrives in MLflow, read back through its own client; losing the store; replaying a run."""

import json
import logging
import multiprocessing
import os
import shutil
import socket
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

from cl.core import UserError
from cl.result import Result
from cl.tracking import Journal, Memory, MLflowTracker, base, chart_url, default_uri, experiment_links, points, sync
from cl.tracking.charts import view_tag
from cl.tracking.points import description
from cl.tracking.store import sqlite_path

pytest.importorskip("mlflow")


def stored(client, run_id):
    """Every point of a run, a repeated one twice."""
    names = client.get_run(run_id).data.metrics
    return sorted((n, m.step, round(m.value, 9)) for n in names for m in client.get_metric_history(run_id, n))


def curves(found):
    return sorted((p.name, p.step, round(p.value, 9)) for p in found)


def only_run(client, experiment):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_round_trip(store, client, make_result, tell, run_dir):
    tracker = MLflowTracker(store, experiment="round", run_dir=run_dir, suite="demo", every_steps=4)
    memory, result = Memory(every_steps=4), make_result()
    tell([memory, tracker], result)
    run = client.get_run(result.mlflow_run_id)

    assert tracker.run_id == result.mlflow_run_id
    assert tracker.experiment_id == run.info.experiment_id
    assert stored(client, run.info.run_id) == curves(memory.points)
    assert (run.info.run_name, run.info.status) == ("derpp+refresh-s7", "FINISHED")
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("cl.")}
    assert len(tags.pop("cl.config_hash")) == 12
    assert tags.pop("cl.version")
    assert tags == {
        "cl.strategy": "derpp+refresh",
        "cl.stream": "permuted_digits",
        "cl.backbone": "mlp",
        "cl.setting": "domain_incremental",
        "cl.suite": "demo",
        "cl.status": "done",
    }
    assert not any(name.startswith("mlflow.parent") for name in run.data.tags)
    assert run.data.params["seed"] == "7"
    assert run.data.params["optimizer.lr"] == "0.1"
    assert len(run.data.params["long"]) == 500
    assert {view_tag(), view_tag("demo")} <= set(client.get_experiment(run.info.experiment_id).tags)
    assert run.inputs.dataset_inputs[0].dataset.name == "permuted_digits"


def test_links_to_what_is_in_the_store(store, client, make_result, tell):
    tell([MLflowTracker(store, suite="first")], make_result(stream="stream_a"))
    number = client.get_experiment_by_name("stream_a").experiment_id
    links = {name: link for name, link in experiment_links(store, "http://h").items() if name.startswith("stream_a")}
    assert links == {
        "stream_a": chart_url("http://h", number),
        "stream_a, first": chart_url("http://h", number, "first"),
    }


def test_artifacts(store, client, make_result, tell, run_dir):
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "R.png").write_bytes(b"png")
    tracker = MLflowTracker(store, experiment="artifacts", run_dir=run_dir)
    result = make_result()
    tell([tracker], result)
    (run_dir / "report.md").write_text("# drawn after the run\n")
    tracker.upload()
    names = {file.path for file in client.list_artifacts(result.mlflow_run_id)}
    assert names == {"config.yaml", "figures", "tables", "report.md"}
    table = client.download_artifacts(result.mlflow_run_id, "tables/accuracy_matrix.json")
    with open(table) as file:
        assert len(json.load(file)["data"]) == 8


def test_hundreds_of_params_and_thousands_of_points(store, client, make_result):
    memory, tracker, result = Memory(1), MLflowTracker(store, experiment="many", every_steps=1), make_result()
    for observer in (memory, tracker):
        observer.on_start(result, {f"p{i}": i for i in range(250)} | {"nested": {"a": {"b": 1}}, "odd@[key]": 1})
        observer.on_experience_start(SimpleNamespace(step=0), 700)
        for _ in range(700):
            observer.on_step(None, {"loss": 1.0}, 0.1)
        observer.flush()
    assert not tracker.is_silent
    params = client.get_run(tracker.run_id).data.params
    assert len(params) == 253
    assert params["nested.a.b"] == params["odd__key_"] == "1"
    assert stored(client, tracker.run_id) == curves(memory.points)


def test_resume_does_not_double(store, client, make_result, tell, run_dir):
    memory = Memory(every_steps=4)
    tell([memory], make_result())
    first = make_result()
    observers = [
        Journal(run_dir, every_steps=4),
        MLflowTracker(store, experiment="resume", run_dir=run_dir, every_steps=4),
    ]
    # the store is ahead of the checkpoint for steps 12 to 18, and behind it for none
    tell(observers, first, stop_at=19)
    for observer in observers:
        observer.flush()
    second = make_result(R=[first.R[0]], mlflow_run_id=first.mlflow_run_id)
    again = [Journal(run_dir, every_steps=4), MLflowTracker(store, experiment="resume", run_dir=run_dir, every_steps=4)]
    tell(again, second, first=1, steps_done=2)
    assert stored(client, first.mlflow_run_id) == curves(memory.points)
    assert only_run(client, "resume").info.status == "FINISHED"


def test_a_run_that_goes_on_elsewhere_finds_its_store(store, client, make_result, tell, tmp_path, monkeypatch):
    home, other = tmp_path / "home", tmp_path / "other"
    run_dir = home / "runs" / "one"
    for folder in (run_dir, other):
        folder.mkdir(parents=True)
    for folder in (tmp_path, home):
        shutil.copy(sqlite_path(store), folder / "mlruns.db")
    (run_dir / "config.yaml").write_text("seed: 7\n")
    monkeypatch.chdir(home)
    result, first = make_result(), MLflowTracker(experiment="moved", run_dir=run_dir)
    tell([first], result, stop_at=14)
    first.flush()
    monkeypatch.chdir(other)
    again = MLflowTracker(experiment="moved", run_dir=run_dir)
    tell([again], make_result(R=result.R, mlflow_run_id=first.run_id), first=1, steps_done=4)
    assert again.uri == default_uri(home), "neither that of the working directory nor the nearest to the root"
    assert not any(other.iterdir())
    tell([fresh := MLflowTracker(experiment="moved", run_dir=run_dir)], make_result())
    assert fresh.uri == default_uri(other)


def test_resume_brings_what_was_not_flushed(store, client, make_result, tell, run_dir):
    memory = Memory(every_steps=4)
    tell([memory], make_result())
    first = make_result()
    journal = Journal(run_dir, every_steps=4)
    tell([journal, MLflowTracker(store, experiment="lag", run_dir=run_dir, every_steps=4)], first, stop_at=19)
    journal.on_checkpoint(None, "")  # then killed: points 12 and 16 never reached the store
    second = make_result(R=[first.R[0]], mlflow_run_id=first.mlflow_run_id)
    tracker = MLflowTracker(store, experiment="lag", run_dir=run_dir, every_steps=4)
    tell([tracker, Journal(run_dir, every_steps=4)], second, first=1, steps_done=6)
    assert stored(client, first.mlflow_run_id) == curves(memory.points)


def test_short_experiences_share_a_flush(store, make_result, tell, monkeypatch):
    tracker = MLflowTracker(store, experiment="flushes")
    sizes = []
    write = tracker.write
    monkeypatch.setattr(tracker, "write", lambda batch: (sizes.append(len(batch)), write(batch)))
    monkeypatch.setattr(base, "time", SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 0.0))
    tell([tracker], make_result())
    assert len(sizes) == 1
    sizes.clear()
    clock = iter(range(10_000))
    monkeypatch.setattr(base, "time", SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 6.0 * next(clock)))
    tell([tracker], make_result())
    assert len(sizes) >= 3


def test_failed_and_interrupted_runs_say_so(store, client, make_result, tell):
    for status, expected in (("failed", "FAILED"), ("interrupted", "KILLED")):
        tell([MLflowTracker(store, experiment=status)], make_result(error="no memory"), last=1, status=status)
        run = only_run(client, status)
        assert (run.info.status, run.data.tags["cl.status"]) == (expected, status)
        note = run.data.tags["mlflow.note.content"]
        assert note.startswith("no memory\n\n") and note.endswith(description(make_result()))
        assert not any(name.startswith("final/") for name in run.data.metrics)


def test_a_run_that_failed_once_and_is_done_now(store, client, make_result, tell):
    first = make_result(error="no memory")
    tell([MLflowTracker(store, experiment="again")], first, last=1, status="failed")
    tell([MLflowTracker(store, experiment="again")], make_result(R=first.R, mlflow_run_id=first.mlflow_run_id), first=1)
    run = only_run(client, "again")
    assert (run.info.status, run.data.tags["cl.status"]) == ("FINISHED", "done")
    assert run.data.tags["mlflow.note.content"] == description(make_result())


def test_server_that_is_not_there(make_result, tell, run_dir, caplog, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    memory, result = Memory(), make_result()
    with caplog.at_level(logging.WARNING):
        tell([MLflowTracker(uri, run_dir=run_dir), memory], result)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"MLflow at {uri} was lost (")
    assert "Connection refused" in warning
    assert f"`cl report {run_dir} sync={uri}`" in warning
    assert result.mlflow_run_id is None
    assert curves(p for p in memory.points if "train/" not in p.name) == curves(points(result))


def test_server_lost_midway_then_synced(store, client, make_result, tell, run_dir, caplog, monkeypatch):
    from mlflow import MlflowClient

    memory, result = Memory(every_steps=4), make_result()
    tracker = MLflowTracker(store, experiment="midway", run_dir=run_dir, every_steps=4)
    monkeypatch.setattr(tracker, "rest_s", 0.0)
    real, calls = MlflowClient.log_batch, []

    def breaks(self, run_id, metrics=(), params=(), tags=()):
        calls.append(len(metrics))
        if len([n for n in calls if n]) > 1:
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(self, run_id, metrics=metrics, params=params, tags=tags)

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(MlflowClient, "log_batch", breaks)
        tell([tracker, Journal(run_dir, every_steps=4), memory], result)
    assert len(caplog.records) == 1
    assert "Connection reset by peer" in caplog.text
    assert tracker.is_silent
    run = client.get_run(result.mlflow_run_id)
    assert run.info.status == "RUNNING"
    assert {step for name, step, _ in stored(client, run.info.run_id) if "train/" not in name} == {1}

    result.save(run_dir / "result.json")
    for _ in range(2):
        assert sync(run_dir, store) == run.info.run_id
        assert stored(client, run.info.run_id) == curves(memory.points)
    assert only_run(client, "midway").info.status == "FINISHED"


def test_sync_creates_the_run_once(store, client, make_result, tell, run_dir):
    memory, result = Memory(every_steps=4), make_result()
    tell([Journal(run_dir, experiment="sync", suite="s", every_steps=4), memory], result)
    result.save(run_dir / "result.json")
    ids = {sync(run_dir, store), sync(run_dir, store)}
    # also when the id in result.json is gone, or belongs to a store that was deleted
    result.mlflow_run_id = "0" * 32
    result.save(run_dir / "result.json")
    ids.add(sync(run_dir, store))
    assert ids == {only_run(client, "sync").info.run_id}
    assert stored(client, ids.pop()) == curves(memory.points)
    run = only_run(client, "sync")
    assert (run.data.tags["cl.suite"], run.data.params["seed"], run.info.status) == ("s", "7", "FINISHED")


def test_sync_writes_the_id_into_the_result(store, make_result, tell, run_dir):
    result = make_result()
    tell([], result)
    result.save(run_dir / "result.json")
    run_id = sync(run_dir, store, experiment="id")
    assert Result.load(run_dir / "result.json").mlflow_run_id == run_id


def test_sync_makes_no_run_newer_than_it_is(store, make_result, tell, run_dir):
    result = make_result()
    tell([], result)
    result.save(run_dir / "result.json")
    os.utime(run_dir / "result.json", (1, 1))
    sync(run_dir, store, experiment="old")
    assert (run_dir / "result.json").stat().st_mtime == 1


def test_no_sentence_tells_the_password_of_a_store(run_dir, make_result, tell, monkeypatch):
    uri = "http://me:secret@127.0.0.1:1"

    def refuses(*details, **named):
        raise RuntimeError(f"API request to {uri}/api failed")

    said = MLflowTracker(uri, run_dir=run_dir).lost(RuntimeError(f"API request to {uri}/api failed"))
    assert "secret" not in said and said.count("http://me:***@127.0.0.1:1") == 3
    result = make_result()
    tell([], result)
    result.save(run_dir / "result.json")
    monkeypatch.setattr("cl.tracking.mlflow.check_store", lambda uri: None)
    monkeypatch.setattr("cl.tracking.mlflow.StoredRun.open", refuses)
    with pytest.raises(UserError, match=r"http://me:\*\*\*@") as caught:
        sync(run_dir, uri)
    assert "secret" not in str(caught.value)


def test_sync_of_a_killed_run_needs_the_journal_only(store, client, make_result, tell, run_dir):
    journal = Journal(run_dir, experiment="killed", every_steps=4)
    tell([journal], make_result(), stop_at=19)
    sync(run_dir, store)
    run = only_run(client, "killed")
    assert run.info.status == "KILLED"
    assert run.data.metrics["accuracy/task_00"] == 0.9


def test_sync_of_nothing_is_a_bad_request(store, tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        sync(tmp_path, store)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="schema"):
        sync(tmp_path, store)


def test_rows_that_runs_share_are_written_again(store, client, make_result, tell, monkeypatch):
    """Two runs that insert the same data set, or the same view, at once: MLflow refuses the later one."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    refused = []

    def refuses_once(name):
        real = getattr(MlflowClient, name)

        def write(self, *details, **named):
            if name not in refused:
                refused.append(name)
                raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed")
            return real(self, *details, **named)

        monkeypatch.setattr(MlflowClient, name, write)

    refuses_once("log_inputs")
    refuses_once("set_experiment_tag")
    tracker = MLflowTracker(store, experiment="beside")
    tell([tracker], make_result())
    assert sorted(refused) == ["log_inputs", "set_experiment_tag"]
    assert not tracker.is_silent
    assert only_run(client, "beside").inputs.dataset_inputs


def write_a_run(uri, seed, together):
    """The job of one process."""
    names = ["a", "b"]
    result = Result("s", ["naive"], "mlp", "domain_incremental", seed, names, names, [0, 1], "accuracy")
    tracker = MLflowTracker(uri, experiment="both", every_steps=1)
    together.wait(60)
    tracker.on_start(result, {"seed": seed})
    tracker.on_experience_start(SimpleNamespace(step=0), 20)
    for _ in range(20):
        tracker.on_step(None, {"loss": 1.0}, 0.1)
        tracker.flush()
    result.R.append([0.5, 0.5])
    tracker.on_evaluation(None, result)
    result.status = "done"
    tracker.on_end(result)
    sys.exit(tracker.is_silent)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starting processes takes too long")
def test_processes_fill_one_store(store, tmp_path):
    from mlflow import MlflowClient

    # a store of its own, so that they meet an experiment, a view and a data set that do not exist
    uri = default_uri(tmp_path)
    shutil.copy(sqlite_path(store), sqlite_path(uri))
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(3)
    writers = [fork.Process(target=write_a_run, args=(uri, seed, together)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("both").experiment_id])
    assert {run.info.run_name for run in runs} == {"naive-s0", "naive-s1", "naive-s2"}
    assert [len(client.get_metric_history(run.info.run_id, "train/loss")) for run in runs] == [20, 20, 20]
