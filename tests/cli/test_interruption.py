"""kill -9, Ctrl-C and SIGTERM at any step, then `cl resume`: the same result, bit for bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from cl.checkpoint import Keeper
from cl.cli.main import main
from cl.ledger import Ledger
from cl.result import Result
from cl.tracking import Journal
from cl.tracking.journal import JOURNAL

RUN = ("run", "tracking=none", "debug=tiny", "strategy=[derpp,ewc]", "trainer.checkpoint_every=7", "optimizer=adam")


def killed_at(step: int, number: int, folder: str) -> SimpleNamespace:
    """A run that sends itself a signal at a step; in a fork, which has imported everything."""
    said = Path("said.txt")
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = sys.stderr = said.open("w")
            watch = Ledger.watch

            def watch_and_die(self: Ledger, state: Any, *more: Any) -> None:
                watch(self, state, *more)
                if state.step == step:
                    os.kill(os.getpid(), number)

            Ledger.watch = watch_and_die  # type: ignore[method-assign]
            code = main((*RUN, f"hydra.run.dir={folder}"))
            sys.stdout.flush()
            os._exit(code)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return SimpleNamespace(returncode=code, said=said.read_text())


def final_state(folder: str) -> dict:
    path = max(Path(folder).glob("checkpoints/*.pt"))
    return torch.load(path, weights_only=True)


def assert_same(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    assert main((*RUN, f"hydra.run.dir={folder}")) == 0
    return folder


@pytest.mark.parametrize(("number", "step"), [(signal.SIGKILL, 31), (signal.SIGINT, 5), (signal.SIGTERM, 45)])
def test_resumes_exactly(
    number: int,
    step: int,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = killed_at(step, number, "run")
    interrupted = Result.load(Path("run/result.json"))
    assert interrupted.status == "interrupted"
    if number == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 1, done.said
        assert "interrupted; go on with `cl resume run`" in done.said
    assert main(("resume", "run")) == 0
    capsys.readouterr()
    whole, resumed = Result.load(uninterrupted / "result.json"), Result.load(Path("run/result.json"))
    assert resumed.status == "done"
    assert (whole.R, whole.R_init, whole.metrics) == (resumed.R, resumed.R_init, resumed.metrics)
    for name in ("forwards", "backwards", "updates", "buffer_bytes"):
        assert whole.cost[name] == resumed.cost[name]
    expected, found = final_state(str(uninterrupted)), final_state("run")
    for key in ("position", "state", "strategies"):
        assert_same(expected[key], found[key])
    points = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()[1:]]
    named = [(point["name"], point["step"]) for point in points]
    assert len(set(named)) == len(named), "a point was logged twice"


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that trains in the folder `run` and waits inside a step."""
    monkeypatch.chdir(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = sys.stderr = io.StringIO()
            watch = Ledger.watch

            def watch_and_wait(self: Ledger, state: Any, *more: Any) -> None:
                watch(self, state, *more)
                if state.step == 31:
                    Path("waits").touch()
                    signal.pause()

            Ledger.watch = watch_and_wait  # type: ignore[method-assign]
            main((*RUN, "hydra.run.dir=run"))
        finally:
            os._exit(99)
    while not Path("waits").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    yield
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.usefixtures("waiting")
def test_a_run_that_is_being_trained_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/result.json").unlink()  # as long as nothing was measured
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for words in (("resume", "run"), (*RUN, "optimizer.lr=1", "out=run")):
        assert main(words) == 2
        assert "run is being trained by another process; wait for it or stop it" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}'])
def test_a_damaged_result_is_a_request_that_can_be_mended(
    text: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "result.json").write_text(text)
    assert main(("resume", str(run))) == 2
    assert "delete it, and the same command goes on from the checkpoint" in capsys.readouterr().err
    (run / "result.json").unlink()
    assert main(("resume", str(run))) == 0
    assert Result.load(run / "result.json").R == Result.load(uninterrupted / "result.json").R


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    killed_at(31, signal.SIGKILL, "run")
    newest = max(Path("run/checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(("resume", "run")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"note: checkpoint {newest} cannot be read" in said
    assert "trying the one before it" in said
    assert Result.load(Path("run/result.json")).R == Result.load(uninterrupted / "result.json").R


def test_no_run_is_running_for_ever(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{shutil.copy(empty_store, tmp_path)}")
    monkeypatch.chdir(tmp_path)
    words = ("run", "debug=tiny", "limit_experiences=1", "out=runs/one", "tracking.uri=sqlite:///mlruns.db")

    def statuses() -> list[str]:
        found = client.search_runs([client.get_experiment_by_name("permuted_digits").experiment_id])
        return sorted(run.info.status for run in found)

    def kill(*details: object, **named: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def finish(self: Keeper) -> None:
        assert main(("report", "runs", "sync=sqlite:///mlruns.db")) == 0
        assert "runs/one is still going on and left out of the sync" in capsys.readouterr().out
        assert statuses() == ["KILLED", "KILLED", "RUNNING"]
        finishes(self)

    finishes = Keeper.finish
    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "save", kill)
        for _ in range(2):  # before the first checkpoint, and there again
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                main(words)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert statuses() == ["KILLED", "RUNNING"]
    assert not Path("runs/one/result.json").exists()
    assert main(("report", "runs", "sync=sqlite:///mlruns.db")) == 2, "there is no result, but the store is told"
    assert "1 runs are in sqlite" in capsys.readouterr().out
    assert statuses() == ["KILLED", "KILLED"]
    monkeypatch.setattr(Keeper, "finish", finish)
    assert main(words) == 0
    assert statuses() == ["FINISHED", "KILLED", "KILLED"]


def test_a_run_killed_after_its_last_result_tells_its_trackers_when_it_goes_on(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def last_points(run: Path) -> list[tuple[str, int]]:
        points = [json.loads(line) for line in (run / JOURNAL).read_text().splitlines()[1:]]
        return sorted((p["name"], p["step"]) for p in points if p["name"].startswith(("final/", "cost/")))

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Journal, "on_end", lambda self, result: os.kill(os.getpid(), signal.SIGKILL))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main((*RUN, "out=run"))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    killed = Result.load(Path("run/result.json"))
    assert killed.status == "done" and last_points(Path("run")) == []
    assert main(("resume", "run")) == 0
    assert last_points(Path("run")) == last_points(uninterrupted) != []
    resumed = Result.load(Path("run/result.json"))
    assert (resumed.R, resumed.metrics, resumed.status) == (killed.R, killed.metrics, "done")
    assert "this run is done" not in capsys.readouterr().out
    assert main(("resume", "run")) == 0
    assert "this run is done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("strategy", "replay", "strategy is 'replay'; it must be settings with their values"),
        ("tracking", 5, "tracking is 5; it must be settings with their values"),
        ("trainer", [1], "trainer is [1]; it must be settings with their values"),
        ("backbone", None, "backbone has no _target_"),
        ("backbone", {"_target_": "Mlp"}, "_target_ 'Mlp' cannot be imported"),
    ],
)
def test_a_config_whose_parts_are_none_is_a_sentence(
    part: str,
    value: object,
    said: str,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run_dir / "result.json").unlink()
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {part: value}))
    assert main(("resume", str(run_dir))) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert len(list(run_dir.glob("checkpoints/*.pt"))) == 2


def test_a_run_without_a_part_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("backbone", "optimizer"):
        assert main(("run", "tracking=none", f"~{part}")) == 2
        assert f"cl: {part} has no _target_ (choose it with {part}=NAME" in capsys.readouterr().err
