"""`cl compare tune=...`: every strategy at its own best setting, chosen on rows and seeds that are not compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cl.cli.compose import composed, plain
from cl.cli.main import main
from cl.cli.tune import Trial, best, grid, tuned
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
        assert f"{100 * max(by_hand.values()):.1f}  chosen" in said
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


def test_a_folder_with_settings_that_were_not_chosen_is_refused_before_a_trial(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*TINY, "strategies=naive,ewc", "seeds=1")
    for label in ("naive", "ewc"):
        Path(f"out/{label}/seed-0").mkdir(parents=True)
        Path(f"out/{label}/seed-0/config.yaml").write_text("")
    monkeypatch.setattr("cl.cli.tune.run_all", lambda plan, console: pytest.fail("a trial was begun"))
    assert main((*words, "tune={optimizer.lr: [0.1, 0.2]}")) == 2
    assert "out/naive holds runs with settings that this tuning did not choose;" in capsys.readouterr().err
    # naive has nothing to choose, and its runs may be those of the comparison
    assert main((*words, "tune={strategy.ewc.strength: [1, 2]}")) == 2
    assert "out/ewc holds runs with settings" in capsys.readouterr().err
    # a single value is not tried and is a choice all the same
    assert main((*words, "tune={optimizer.lr: [0.3], strategy.ewc.strength: [1, 2]}")) == 2
    assert "out/naive holds runs with settings" in capsys.readouterr().err
    Path("out/tuning.json").write_text('{"naive": {"chosen": ["optimizer.lr=0.3"]}}')
    assert main((*words, "tune={optimizer.lr: [0.1, 0.2]}")) == 2
    assert "out/naive holds runs with settings" in capsys.readouterr().err


def test_settings_of_a_strategy_concern_its_compositions_only() -> None:
    values = {"optimizer.lr": [1, 2], "strategy.replay.capacity": [5, 6]}
    assert grid(values, ["naive"]) == [("optimizer.lr=1",), ("optimizer.lr=2",)]
    assert len(grid(values, ["naive", "replay"])) == 4
    assert grid({"strategy.replay.capacity": [5]}, ["naive"]) == [()]


def test_a_single_value_is_applied_without_a_trial() -> None:
    assert main((*TINY, "strategies=naive", "seeds=1", "tune={optimizer.lr: [0.05]}")) == 0
    noted = json.loads(Path("out/tuning.json").read_text())
    assert noted["naive"]["chosen"] == ["optimizer.lr=0.05"] and noted["naive"]["tried"] == {}
    assert "lr: 0.05\n" in Path("out/naive/seed-0/config.yaml").read_text()
    assert not Path("out-tuning").exists()


def test_a_single_value_is_applied_beside_the_trials_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl.cli.tune.run_all", lambda plan, console: runs.extend(plan.runs))
    monkeypatch.setattr("cl.cli.tune.best", lambda trials, measure: trials[1])
    runs: list[Path] = []
    values = {"optimizer.lr": [0.05], "strategy.derpp.alpha": [0.1, 0.5]}
    request = plain(composed("compare", ["strategies=[naive,derpp]", "seeds=1", "out=out", "debug=tiny"]))
    plan = tuned(request | {"tune": values}, ["debug=tiny"], Console())
    assert {path.parents[2].name for path in runs} == {"derpp"} and len(runs) == 2
    config = {path.parent.name: each for path, each in plan.runs.items()}
    assert {each["optimizer"]["lr"] for each in config.values()} == {0.05}
    assert config["derpp"]["strategy"]["derpp"]["alpha"] == 0.5
    noted = json.loads(Path("out/tuning.json").read_text())
    assert noted["naive"]["chosen"] == ["optimizer.lr=0.05"]


def test_a_trial_that_diverged_has_no_measure_and_is_never_chosen(tmp_path: Path) -> None:
    names = ("s", ["naive"], "mlp", "domain_incremental", 0, ["a"], ["a"], [0], "accuracy")
    trials = []
    for final in (None, 0.2):
        folder = tmp_path / str(final)
        Result(*names, metrics={"final": final}, status="done").save(folder / "result.json")
        trials.append(Trial("naive", (), SimpleNamespace(runs={folder: {}})))
    assert best(trials, "accuracy") is trials[1]
    with pytest.raises(UserError, match="no setting of naive could be trained to the end with a finite measure"):
        best(trials[:1], "accuracy")


def test_values_are_written_as_hydra_reads_them() -> None:
    for value in (None, True, 0.1, "cosine", [1, None, "a b"], {"a": [False, 2]}):
        ((word,),) = grid({"trainer.clip_norm": [value]}, ["naive"])
        assert plain(composed("run", [word]))["trainer"]["clip_norm"] == value


def test_the_best_has_the_highest_accuracy_or_the_lowest_loss() -> None:
    trials = [SimpleNamespace(label="x", final=value) for value in (0.4, float("nan"), 0.7, 0.7)]
    assert best(trials, "accuracy") is trials[2]
    assert best(trials, "loss") is trials[0]
    with pytest.raises(UserError, match="no setting of x could be trained to the end with a finite measure"):
        best(trials[1:2], "accuracy")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("tune={}",), "tune is {}; it must name settings and lists of values"),
        (("tune_seeds=3",), "'tune_seeds=3' is for the trials of tune={...}, which is not given"),
        (("tune_on=stream.eval_on=test",), "is for the trials of tune={...}, which is not given"),
        (("tune=0.1",), "tune is 0.1; it must name settings and lists of values"),
        (("tune={optimizer.lr: 0.1}",), "it must name settings and lists of values"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_seeds=[0]"), "the comparison uses 0 too"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_seeds=0"), "tune_seeds is 0"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_on=stream.eval_on=train"), "eval_on is 'train'"),
        (("tune={optimizer.rate: [0.1, 0.2]}",), "rate"),
        (
            ("tune={optimizer.lr: [0.1, 0.2]}", "stream=probes/mqar", "backbone=gpt"),
            "(in the trials, which run with optimizer.lr=0.1 stream.eval_on=validation)",
        ),
        (
            ("tune={strategy.replya.capacity: [5, 6]}",),
            "'strategy.replya.capacity' is for replya, which is not compared",
        ),
        (("tune={optimizer.lr: [0.1, 0.2]}", "seeds=2.5"), "seeds is 2.5; it must be a number of seeds of at least 1"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "seeds=null"), "seeds is None; it must be a number of seeds of at least"),
        (("tune={optimizer.lr: [0.1, 0.2]}", "tune_seeds=2.5"), "tune_seeds is 2.5; it must be a number of seeds"),
    ],
)
def test_bad_requests_are_one_sentence(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = () if words[-1].startswith("seeds=") else ("seeds=1",)
    assert main((*TINY, "strategies=naive", *seeds, *words)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert not list(Path().rglob("result.json"))
