"""`cl compare tune=...`: every strategy at its own best setting, chosen on rows and seeds that are not compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cl.cli.main import main
from cl.cli.tune import best, grid
from cl.core import UserError
from cl.result import Result

TINY = ("compare", "tracking=none", "debug=tiny", "limit_experiences=2", "out=out", "jobs=2")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configs(folder: str) -> dict[str, str]:
    return {str(path.parent): path.read_text() for path in Path(folder).rglob("config.yaml")}


@pytest.mark.slow
def test_each_composition_gets_its_best_setting(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        *TINY,
        "strategies=naive,replay",
        "seeds=[3]",
        "tune={optimizer.lr: [0.001, 0.1, 1e9]}",
        "tune_seeds=[7,8]",
    )
    assert main(words) == 0
    said = capsys.readouterr().out
    noted = json.loads(Path("out/tuning.json").read_text())
    assert set(noted) == {"naive", "replay"}
    for label, note in noted.items():
        tried = note["tried"]
        assert tried["optimizer.lr=1000000000.0"] is None, "this rate diverges: a failed trial has no final measure"
        by_hand = {
            f"optimizer.lr={lr}": sum(
                Result.load(path).metrics["final"]
                for path in Path(f"out-tuning/{label}/optimizer.lr={lr}").rglob("result.json")
            )
            / 2
            for lr in (0.001, 0.1)
        }
        assert {name: tried[name] for name in by_hand} == pytest.approx(by_hand)
        assert note["chosen"] == [max(by_hand, key=lambda name: by_hand[name])]
        assert note["seeds"] == [7, 8]
        final = Path(f"out/{label}/seed-3/config.yaml").read_text()
        assert f"lr: {note['chosen'][0].partition('=')[2]}\n" in final
        assert "eval_on: validation" not in final
    assert all("eval_on: validation" in text for text in configs("out-tuning").values())
    assert "chosen" in said
    assert "failed" in said
    # again: nothing is repeated, and the comparison is not mistaken for another
    times = {path: path.stat().st_mtime_ns for path in Path().rglob("result.json") if "1e9" not in str(path)}
    done = {path: time for path, time in times.items() if Result.load(path).status == "done"}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_settings_of_a_strategy_concern_its_compositions_only() -> None:
    values = {"optimizer.lr": [1, 2], "strategy.replay.capacity": [5, 6]}
    assert grid(values, ["naive"]) == [("optimizer.lr=1",), ("optimizer.lr=2",)]
    assert len(grid(values, ["naive", "replay"])) == 4
    assert grid({"strategy.replay.capacity": [5]}, ["naive"]) == [()]


def test_the_best_has_the_highest_accuracy_or_the_lowest_loss() -> None:
    trials = [SimpleNamespace(label="x", final=value) for value in (0.4, float("nan"), 0.7, 0.7)]
    assert best(trials, "accuracy") is trials[2]
    assert best(trials, "loss") is trials[0]
    with pytest.raises(UserError, match="no setting of x could be trained to the end"):
        best(trials[1:2], "accuracy")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("tune=0.1",), "tune is 0.1; it must name settings and lists of values"),
        (("tune={optimizer.lr: 0.1}",), "it must name settings and lists of values"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_seeds=[0]"), "the comparison uses 0 too"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_seeds=0"), "tune_seeds is 0"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_on=stream.eval_on=train"), "eval_on is 'train'"),
        (("tune={optimizer.rate: [0.1, 0.2]}",), "rate"),
    ],
)
def test_bad_requests_are_one_sentence(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main((*TINY, "strategies=naive", "seeds=1", *words)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert not list(Path().rglob("result.json"))
