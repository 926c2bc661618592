"""Runs whose process or whose store ends before they do: killed at their start, or with a full disk."""

import logging
import sqlite3

import pytest

from cl.core import UserError
from cl.tracking import Journal, Memory, MLflowTracker, sync

pytest.importorskip("mlflow")


def test_a_run_killed_at_its_start_is_not_running_when_the_folder_is_used_again(
    store, client, make_result, tell, run_dir
):
    result = make_result()
    first, journal = MLflowTracker(store, experiment="start", run_dir=run_dir), Journal(run_dir, experiment="start")
    for observer in (first, journal):
        observer.on_start(result, {})
    assert client.get_run(first.run_id).info.status == "RUNNING"
    again, fresh = make_result(), MLflowTracker(store, experiment="start", run_dir=run_dir)
    tell([fresh, Journal(run_dir, experiment="start")], again)
    assert fresh.run_id != first.run_id
    killed, done = client.get_run(first.run_id), client.get_run(fresh.run_id)
    assert (killed.info.status, killed.data.tags["cl.status"]) == ("KILLED", "interrupted")
    assert done.info.status == "FINISHED"
    # a finished one is no attempt, whatever else begins there
    tell([MLflowTracker(store, experiment="start", run_dir=run_dir)], make_result())
    assert client.get_run(fresh.run_id).info.status == "FINISHED"


def test_sync_of_a_run_killed_at_its_start(store, client, make_result, run_dir):
    result = make_result()
    for observer in (MLflowTracker(store, experiment="begun", run_dir=run_dir), Journal(run_dir, experiment="begun")):
        observer.on_start(result, {})
    assert sync(run_dir, store) == result.mlflow_run_id
    assert client.get_run(result.mlflow_run_id).info.status == "KILLED"


def test_a_full_disk_is_one_sentence(store, make_result, tell, run_dir, caplog, capsys, monkeypatch):
    from sqlalchemy.engine.default import DefaultDialect

    real = DefaultDialect.do_execute

    def full(self, cursor, statement, parameters, context=None):
        if statement.startswith(("INSERT", "UPDATE")):
            raise sqlite3.OperationalError("database or disk is full")
        real(self, cursor, statement, parameters, context)

    result, memory = make_result(), Memory()
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(DefaultDialect, "do_execute", full)
        tell([MLflowTracker(store, experiment="full", run_dir=run_dir), memory], result)
        result.save(run_dir / "result.json")
        with pytest.raises(UserError, match=r"refused the run in .*: database or disk is full$"):
            sync(run_dir, store)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"MLflow at {store} was lost (database or disk is full); the run goes on" in warning
    assert "SQLAlchemy database error" not in capsys.readouterr().err
    assert memory.curve("final/accuracy_avg"), "the run went on"
