"""TRC2 and consolidation through the real command: what it refuses, and the controller's curves in MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl.cli.main import main

SMALL = (
    "stream=builtin_text",
    "stream.context=32",
    "stream.train_tokens=3200",
    "stream.eval_tokens=1000",
    "backbone=trc2",
    "backbone.width=16",
    "backbone.num_layers=2",
    "backbone.num_slots=12",
    "backbone.min_surprise=0",
    "strategy=consolidation",
    "trainer.batch_size=4",
    "trainer.max_steps=4",
    "trainer.eval_rows=8",
    "trainer.eval_every=2",
)
CASES = {
    "more slots than memory": (
        "backbone.num_slots=1000000000000",
        "backbone.num_slots is 1000000000000, which would take",
    ),
    "a chunk that does not divide the segment": (
        "backbone.chunk=7",
        "backbone.chunk is 7; it must divide the 32 tokens of a row",
    ),
    "a split outside the columns": (
        "backbone.injection=2",
        "backbone.injection is 2 for 2 columns; it must be an integer from 1 to backbone.num_layers - 1 = 1",
    ),
    "a first form with more chosen columns than there are": (
        "backbone.blocks=trc2_v1(top=99)",
        "top of trc2_v1 is 99; it must be from 2 to its number of columns, 16",
    ),
}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", CASES)
def test_refuses_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    word, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    words = [each for each in SMALL if "blocks" not in word or not each.startswith("backbone")]
    words = [each for each in words if each.partition("=")[0] != word.partition("=")[0]]
    first = ("backbone=trc2_v1",) if "blocks" in word else ()
    assert main(("run", "tracking=none", *words, *first, word.replace("=trc2_v1(top=99)", "='trc2_v1(top=99)'"))) == 2
    sentence = said(capsys)
    assert expected in sentence
    assert sentence.startswith("cl: ")
    assert "Traceback" not in sentence
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_curves_of_the_controller_and_a_store_of_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run: weight, share, long-term fraction and forgetting are curves in MLflow; other slots cannot go on."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path}/store.db"
    assert main(("run", *SMALL, f"tracking.uri={uri}", f"hydra.run.dir={run_dir}")) == 0
    client = MlflowClient(uri)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    for name in ("weight", "share", "long_frac", "forgetting"):
        curve = client.get_metric_history(run.info.run_id, f"train/consolidation_{name}")
        assert len(curve) > 2, f"{name} is no curve"
        assert [point.step for point in curve] == sorted({point.step for point in curve})
    config, result = run_dir / "config.yaml", run_dir / "result.json"
    config.write_text(config.read_text().replace("num_slots: 12", "num_slots: 6"))
    result.write_text(result.read_text().replace('"done"', '"interrupted"'))
    assert main(("resume", str(run_dir))) == 2
    sentence = said(capsys)
    assert "num_slots" in sentence or "belongs to a run with other settings" in sentence
    assert "Traceback" not in sentence
