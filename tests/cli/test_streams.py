"""Streams around streams, from the command line: nested nodes, what is refused, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl.cli import build
from cl.cli.compose import composed, seeded
from cl.cli.main import main
from cl.result import Result

RUN = ("run", "tracking=none", "hydra.run.dir=run")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_another_base_gets_seed_and_data_root() -> None:
    words = ["stream=power_law", "stream@stream.base=split_mnist", "data.root=/data", "stream.base.num_experiences=2"]
    config = seeded(composed("run", words), seed=3)
    base = config["stream"]["base"]
    assert (base["seed"], base["root"], base["num_experiences"]) == (3, "/data", 2)
    assert config["stream"]["seed"] == 3


def test_settings_name_what_is_nested_and_where_data_lie_does_not_matter() -> None:
    words = ["stream=power_law", "stream@stream.base=split_mnist", "stream.ratio=0.5"]
    here, there = (seeded(composed("run", [*words, f"data.root={root}"]), 0) for root in ("/a", "/b"))
    flat = build.settings(here)
    assert flat["stream.base"] == "streams.split.split"
    assert flat["stream.base.dataset"] == "mnist"
    assert flat["stream.base.num_experiences"] == 5
    assert flat["stream.ratio"] == 0.5
    assert build.fingerprint(here) == build.fingerprint(there)
    other = seeded(composed("run", [*words, "stream.base.num_experiences=2"]), 0)
    assert build.fingerprint(here) != build.fingerprint(other)


def test_a_run_around_another_stream(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("stream=power_law", "stream@stream.base=split_digits", "stream.num_rows=100", "trainer.batch_size=20")
    assert main([*RUN, *words]) == 0
    result = Result.load(Path("run/result.json"))
    assert result.stream == "power_law_split_digits"
    assert result.trained == [0, 1, 2, 3, 4]
    assert result.practises == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert result.schema == 1
    assert "classes 8 9" in capsys.readouterr().out


@pytest.mark.parametrize("stream", ["permuted_digits", "digits360", "power_law"])
def test_any_stream_can_be_overfitted(stream: str) -> None:
    assert main([*RUN, f"stream={stream}", "debug=overfit", "trainer.epochs=1"]) == 0
    result = Result.load(Path("run/result.json"))
    assert len(result.experiences) == 1 and len(result.R) == 1


@pytest.mark.parametrize("word", ["+experiment=demo", "experiment=demo"])
def test_an_experiment_is_shortened_too(word: str) -> None:
    trainer = composed("run", ["debug=tiny", word])["trainer"]
    assert (trainer["epochs"], trainer["max_steps"], trainer["batch_size"]) == (None, 20, 32)
    assert composed("run", [word])["trainer"]["epochs"] == 10


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight through, and stopped after two of four experiences: the same numbers."""
    words = ("stream=blurry", "stream.base.num_experiences=5", "trainer.batch_size=32")
    assert main([*RUN, *words]) == 0
    assert main(["run", "tracking=none", "hydra.run.dir=stopped", *words, "trainer.checkpoint_every=3"]) == 0
    folder = Path("stopped")
    newest, *_ = sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True)
    newest.unlink()
    content = json.loads((folder / "result.json").read_text()) | {"status": "interrupted"}
    (folder / "result.json").write_text(json.dumps(content))
    assert main(["resume", "stopped"]) == 0
    straight, resumed = (Result.load(Path(name) / "result.json") for name in ("run", "stopped"))
    assert resumed.R == straight.R
    assert resumed.practises == straight.practises


def test_long_streams_are_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("stream=scole_digits", "stream.num_experiences=120", "stream.rows_per_class=8", "stream.eval_rows=20")
    assert main([*RUN, *words, "trainer.logit_mask=batch"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 45
    assert "... 90 more" in said
    assert "mean of the last fifth" in said
    assert main(["report", "run"]) == 0
    figures = {path.stem for path in Path("run").rglob("*.png")}
    assert figures >= {"revisit", "accuracy_matrix", "forgetting_curves"}


BAD = {
    "a base with heads": (
        ("stream=blurry", "stream.base.setting=task_incremental"),
        "stream.base is split_digits in the setting task_incremental; blurry takes streams",
    ),
    "a base that is none": (
        ("stream=power_law", "stream.base=permuted_digits"),
        "stream.base is 'permuted_digits'; it must be a stream (on the command line: stream@stream.base=NAME)",
    ),
    "a base that makes no stream": (
        ("stream=power_law", "stream.base._target_=os.system"),
        "stream.base._target_ is 'os.system', which makes no stream",
    ),
    "an unknown option of the base": (
        ("stream=power_law", "stream.base.shape=square"),
        "stream.base has no option 'shape'; its options are dataset",
    ),
    "too many classes": (
        ("stream=scole_digits", "stream.classes_per_experience=12"),
        "stream.classes_per_experience is 12; with kind random there are 10 classes",
    ),
    "a share above all": (("stream=blurry", "stream.blur=2"), "stream.blur is 2; it must be above 0 and at most 1"),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert said.startswith("cl: ") and len(said.splitlines()) == 1, said
    assert not list(Path().rglob("result.json"))
