"""What a run shares with Hydra: its folder, its log, its sweeps and launchers; what is lost of a sweep goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cl.cli import launch
from cl.cli.main import main
from cl.result import Result

RUN = ("run", "tracking=none", "debug=tiny", "limit_experiences=2", "trainer.max_steps=4")
OWN = """
import logging, os, signal
from cl.hooks import Strategy
class Speaker(Strategy):
    def on_run_start(self, state):
        logging.getLogger("somebody").warning("the server is lost")
        logging.getLogger("somebody").info("chatter")
class Stopper(Strategy):
    def on_step_end(self, state, batch, output):
        signal.raise_signal(signal.SIGINT)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_hydra_words.py").write_text(OWN)


@pytest.mark.parametrize("word", ["out=", "out=null"])
def test_a_folder_without_a_name_gets_one(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*RUN, word)) == 0
    (folder,) = Path("runs").glob("*/*")
    assert f"run folder: {folder}" in capsys.readouterr().out


def test_configs_may_ask_hydra_where_the_run_is() -> None:
    assert main((*RUN, "out=one", "+origin.where=${hydra:runtime.output_dir}")) == 0
    assert f"where: {Path('one').absolute()}" in Path("one/config.yaml").read_text()


@pytest.mark.parametrize("words", [(), ("-m",)], ids=["run", "sweep"])
def test_what_a_library_warns_of_is_said_once_and_logged_once(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main((RUN[0], *words, *RUN[1:], "strategy=own_hydra_words.Speaker", "out=one")) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "the server is lost" in line or "chatter" in line]
    assert said == ["note: the server is lost"]
    (log,) = Path("one").rglob("run.log")
    assert log.read_text().count("the server is lost") == log.read_text().count("chatter") == 1


def test_to_stop_a_run_is_to_stop_its_sweep() -> None:
    words = ("strategy=own_hydra_words.Stopper", "seed=0,1", "out=sweep")
    assert main((RUN[0], "-m", *RUN[1:], *words)) == 1
    assert Result.load(Path("sweep/0/result.json")).status == "interrupted"
    assert not Path("sweep/1").exists()


def unfinished(folder: Path) -> None:
    """As if it had been killed in its second experience."""
    max(folder.glob("checkpoints/step-*.pt")).unlink()
    path = folder / "result.json"
    path.write_text(path.read_text().replace('"status": "done"', '"status": "interrupted"'))


def test_a_run_of_a_comparison_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*RUN, "out=whole")) == 0
    shutil.copytree("whole", "one")
    unfinished(Path("one"))
    assert main((*RUN, "out=one")) == 2, "nobody said that it is one of a comparison"
    assert main((*RUN, "out=one", "+suite=mine", "optimizer.lr=0.2")) == 2
    assert "one holds a run with other settings" in capsys.readouterr().err
    assert main((*RUN, "out=one", "+suite=mine")) == 0
    whole, one = (Result.load(Path(name) / "result.json") for name in ("whole", "one"))
    assert one.status == "done" and one.R == whole.R
    assert one.cost["forwards"] == whole.cost["forwards"], "what was done already was done again"


@pytest.mark.slow
def test_a_launcher_goes_on_with_what_is_unfinished() -> None:
    words = ("compare", *RUN[1:], "strategies=naive", "seeds=3", "launcher=joblib", "jobs=2", "out=all")
    assert main(words) == 0
    before = {seed: Result.load(Path(f"all/naive/seed-{seed}/result.json")) for seed in range(3)}
    unfinished(Path("all/naive/seed-0"))
    shutil.rmtree("all/naive/seed-1")
    Path("all/naive/seed-1").mkdir()
    kept = Path("all/naive/seed-2/result.json").read_bytes()
    assert main(words) == 0
    after = {seed: Result.load(Path(f"all/naive/seed-{seed}/result.json")) for seed in range(3)}
    assert [each.status for each in after.values()] == ["done"] * 3
    assert [each.R for each in after.values()] == [each.R for each in before.values()]
    assert Path("all/naive/seed-2/result.json").read_bytes() == kept


@pytest.mark.slow
def test_what_fails_in_the_process_of_a_launcher_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.batch_size=0", "out=sweep")
    assert main((RUN[0], "-m", *RUN[1:], *words)) == 2
    assert "cl: trainer.batch_size is 0; it must be an integer of at least 1" in capsys.readouterr().err
    assert not list(Path("sweep").glob("*/")), "nothing was begun"


def test_a_launcher_that_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert main(("compare", *RUN[1:], "strategies=naive", "seeds=1", "launcher=submitit_slurm", "out=all")) == 2
    assert "which needs the package hydra-submitit-launcher" in capsys.readouterr().err
    assert not Path("all").exists()
