"""Scores of other benchmarks: kept in the journal once, and sent to the store that holds the run."""

import math

import pytest

from cl.core import UserError
from cl.tracking import Journal, MLflowTracker, Point, read_journal
from cl.tracking.scores import keep_points, score_points, send


def kept(run_dir):
    return [tuple(point) for point, _ in read_journal(run_dir / "metrics.jsonl")[1]]


def test_scores_stand_at_the_experiences_that_are_finished():
    scores = {"colours": {"acc": 0.5, "bad": math.nan}, "a task[0]": {"exact,none": 1}}
    assert score_points(scores, 3) == [
        Point("lm_eval/colours/acc", 0.5, 3),
        Point("lm_eval/a task_0_/exact_none", 1, 3),
    ]


def test_what_is_known_already_stays_as_it_is(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"journal": "one"}\n')
    assert keep_points(tmp_path, score_points({"colours": {"acc": 0.5}}, 2)) == 1
    again = score_points({"colours": {"acc": 0.75, "f1": 0.25}}, 2) + score_points({"colours": {"acc": 1.0}}, 3)
    assert keep_points(tmp_path, again) == 2
    expected = [("lm_eval/colours/acc", 0.5, 2), ("lm_eval/colours/f1", 0.25, 2), ("lm_eval/colours/acc", 1.0, 3)]
    assert kept(tmp_path) == expected
    assert read_journal(tmp_path / "metrics.jsonl")[0] == {"journal": "one"}


def test_a_line_cut_short_by_a_crash_takes_no_score_with_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"journal": "one"}\n{"name": "train/loss", "val')
    assert keep_points(tmp_path, score_points({"colours": {"acc": 0.5}}, 2)) == 1
    assert kept(tmp_path) == [("lm_eval/colours/acc", 0.5, 2)]


def test_a_folder_without_a_journal_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl, to which scores are added"):
        keep_points(tmp_path, [])


def test_scores_arrive_once_in_the_run_that_they_belong_to(store, client, make_result, tell, run_dir):
    pytest.importorskip("mlflow")
    result = make_result()
    tell([MLflowTracker(store, experiment="scored", run_dir=run_dir), Journal(run_dir, experiment="scored")], result)
    result.save(run_dir / "result.json")
    for value in (0.5, 0.75):
        keep_points(run_dir, score_points({"colours": {"acc": value}}, 3))
        assert send(run_dir, store) == f"in MLflow as lm_eval/... of run {result.mlflow_run_id}"
    (found,) = client.get_metric_history(result.mlflow_run_id, "lm_eval/colours/acc")
    assert (found.value, found.step) == (0.5, 3)


def test_a_run_in_no_store_and_a_store_that_is_gone_are_said(make_result, tell, run_dir):
    result = make_result()
    tell([Journal(run_dir)], result)
    result.save(run_dir / "result.json")
    said = "the run is in no store; `cl report {} sync={}` puts it into one"
    assert send(run_dir, "sqlite:////x/y.db") == said.format(run_dir, "sqlite:////x/y.db")
    result.mlflow_run_id = "0" * 32
    result.save(run_dir / "result.json")
    said = send(run_dir, "foo://x")
    assert "no known kind of address" in said
    assert said.endswith(f"; `cl report {run_dir} sync=URI` sends the scores later")
