"""`cl compare`: paired seeds, in parallel, resumable, and not ended by the death of one run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cl.cli.compare import make_plan, split_words
from cl.cli.compose import composed, plain
from cl.cli.execute import _recorders
from cl.cli.folder import PARTS
from cl.cli.launch import sweep
from cl.cli.main import main
from cl.cli.report import comparison_table
from cl.report.comparison import Estimate, StrategyRow
from cl.result import Result

TINY = ("tracking=none", "debug=tiny", "limit_experiences=2", "out=out", "jobs=2")

MORTAL = '''"""A strategy whose process dies once."""
import os
import signal
from pathlib import Path

from cl.hooks import Strategy


class Mortal(Strategy):
    """Kills its process at step 25 of seed 1, the first time."""

    def on_step_end(self, state, batch, output):
        mark = Path("died")
        if state.seeds.root == 1 and state.step == 25 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


IMPATIENT = '''"""A strategy that makes its user press Ctrl-C."""
import os
import signal

from cl.hooks import Strategy


class Impatient(Strategy):
    """Interrupts the command at step 25 of seed 0."""

    def on_step_end(self, state, batch, output):
        if state.seeds.root == 0 and state.step == 25 and "COMMAND" in os.environ:
            # what the command sends in turn is awaited, or the run might end before; by a file, since any thread may be
            # the one that a signal interrupts
            told, tells = os.pipe()
            os.set_blocking(tells, False)
            signal.set_wakeup_fd(tells)
            os.kill(int(os.environ["COMMAND"]), signal.SIGINT)
            os.read(told, 1)
'''

COMMAND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
os.environ["COMMAND"] = str(os.getpid())
from cl.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def results() -> dict[str, Result]:
    paths = Path("out").glob("*/seed-*/result.json")
    return {f"{path.parent.parent.name}/{path.parent.name}": Result.load(path) for path in paths}


def test_compares_on_the_same_seeds_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", *TINY, "strategies=naive,[naive,replay]", "seeds=0,2", "strategy.replay.capacity=50")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert sorted(results()) == ["naive+replay/seed-0", "naive+replay/seed-2", "naive/seed-0", "naive/seed-2"]
    assert all(result.status == "done" for result in results().values())
    assert Path("out/report/report.html").stat().st_size > 10_000
    assert "naive+replay" in said and "report: out/report/report.html" in said
    # the first row of R is measured after the same training, so the pairing is visible in the numbers
    assert results()["naive/seed-0"].R_init == results()["naive+replay/seed-0"].R_init

    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/seed-*/result.json")}
    assert main(words) == 0
    assert "4 of 4 runs are done already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_one_death_is_reported_and_the_next_call_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mortal.py").write_text(MORTAL)
    words = ("compare", *TINY, "strategies=naive,mortal.Mortal", "seeds=2", "trainer.checkpoint_every=10")
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "mortal/seed-1: killed by signal 9" in said
    assert "1 of 4 runs did not finish; the same command goes on with them" in said
    finished = results()
    assert finished.pop("mortal/seed-1").status == "interrupted"
    assert {result.status for result in finished.values()} == {"done"}

    assert main(words) == 0
    assert "3 of 4 runs are done already" in capsys.readouterr().out
    after = results()["mortal/seed-1"]
    assert after.status == "done"
    # a strategy that does nothing but die once trains like naive, through its death
    assert after.R == results()["naive/seed-1"].R


@pytest.mark.slow
def test_ctrl_c_leaves_checkpoints_and_the_next_call_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("impatient.py").write_text(IMPATIENT)
    words = ("compare", *TINY, "strategies=naive,impatient.Impatient", "seeds=2")
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "stopped impatient/seed-0: interrupted; the same command goes on with it" in done.stdout
    assert "goes on" in done.stderr and "Traceback" not in done.stderr
    assert "failed" not in {result.status for result in results().values()}

    assert main(words) == 0
    after = results()
    assert len(after) == 4 and {result.status for result in after.values()} == {"done"}
    assert after["impatient/seed-0"].R == after["naive/seed-0"].R


def test_other_settings_in_the_same_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("compare", *TINY, "strategies=naive", "seeds=1")) == 0
    assert main(("compare", *TINY, "strategies=naive", "seeds=1", "optimizer.lr=0.5")) == 2
    assert "holds a run with other settings; choose another folder with out=FOLDER" in capsys.readouterr().err


def test_a_launcher_is_told_the_names_and_what_was_chosen() -> None:
    own, others = split_words([*TINY, "strategies=replay,avalanche/EWC", "seeds=2", "strategy.replay.capacity=50"])
    plan = make_plan(plain(composed("compare", own)), others, {"replay": ["optimizer.lr=0.02"]})
    command = sweep(plan, "replay", [0, 1], "joblib")
    assert {"strategy=[replay]", "seed=0,1", "optimizer.lr=0.02", "strategy.replay.capacity=50"} <= set(command)
    (theirs,) = [label for label in plan.words if label != "replay"]
    command = sweep(plan, theirs, [0], "joblib")
    assert "strategy=[avalanche/EWC]" in command
    assert not {"optimizer.lr=0.02", "strategy.replay.capacity=50"} & set(command)


def test_the_number_of_processes_is_told_to_joblib() -> None:
    plan = make_plan(plain(composed("compare", ["strategies=[naive]", "jobs=3"])), [])
    assert "hydra.launcher.n_jobs=3" in sweep(plan, "naive", [0], "joblib")
    assert "n_jobs" not in " ".join(sweep(plan, "naive", [0], "submitit_slurm"))


def test_options_of_an_experiment_concern_the_strategies_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl.cli.compare.check", lambda config: SimpleNamespace(name="s", measure="accuracy"))
    words = ["+experiment=split_mnist_er_200"]
    plan = make_plan(plain(composed("compare", ["strategies=[naive,replay,[naive,replay]]", "seeds=1", *words])), words)
    strategy = {folder.parent.name: config["strategy"] for folder, config in plan.runs.items()}
    assert list(strategy["naive"]) == ["naive"]
    assert list(strategy["replay"]) == ["replay"] and strategy["replay"]["replay"]["capacity"] == 200
    assert list(strategy["naive+replay"]) == ["naive", "replay"]
    # a launcher composes for itself
    assert "~strategy.replay" in sweep(plan, "naive", [0], "joblib")


def test_a_file_in_the_way_is_named_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").write_text("")
    assert main(("compare", *TINY, "strategies=naive", "seeds=1")) == 2
    said = capsys.readouterr()
    assert said.err == "cl: the folder out cannot be written: Not a directory\n" and not said.out


def test_a_folder_may_be_called_by_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    words, others = split_words(["out=2024"])
    assert plain(composed("compare", words))["out"] == "2024" and not others
    assert plain(composed("compare", split_words(["out=null"])[0]))["out"] is None


def test_a_result_that_cannot_be_read_is_named_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", *TINY, "strategies=naive", "seeds=1")
    assert main(words) == 0
    path = Path("out/naive/seed-0/result.json")
    whole = Result.load(path)
    path.write_text("{")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{path} is not a result file" in said and "delete it, and the same command goes on with that run" in said
    path.unlink()
    assert main(words) == 0
    assert Result.load(path).R == whole.R


def test_branches_beside_the_runs_are_no_part_of_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", *TINY, "strategies=naive,replay", "seeds=1", "schedule=linear", "schedule.final=0.2")
    assert main(words) == 0
    assert main(("fork_anneal", "out/naive/seed-0", "steps=2")) == 0
    (branch,) = Path("out/naive").glob("seed-0-*")
    capsys.readouterr()
    assert main(("report", "out", "reference=naive")) == 0
    said = capsys.readouterr().out
    assert "naive(" not in said and "final - naive" in said and "is left out" in said
    assert main(("report", "out", "reference=nonsense")) == 2
    assert "reference is 'nonsense'; it must be one of naive, replay" in capsys.readouterr().err
    assert main(("report", str(branch))) == 0
    # one strategy is compared with nothing, and has no empty columns for it
    said = capsys.readouterr().out
    assert "forgetting" in said and "reference" not in said and "Holm p" not in said
    assert "left out" not in capsys.readouterr().out


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl.report.figures.save_figures", lambda view, folder: [])


def a_result(folder: str, strategy: str = "naive", **changes: Any) -> Path:
    """The file of a run that is done."""
    names = ["a", "b"]
    result = Result("toy", [strategy], "mlp", "domain_incremental", 0, names, names, [0, 1], "accuracy", status="done")
    result.R = [[0.9, 0.1], [0.6, 0.8]]
    vars(result).update(changes)
    result.save(Path(folder) / "result.json")
    return Path(folder) / "result.json"


@pytest.mark.usefixtures("no_figures")
def test_brackets_in_names_and_paths_are_printed_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    a_result("out[b]/1", "naive(blocks=[delta])")
    a_result("out[b]/2", "naive(blocks=[gla])")
    a_result("out[b]/[/b]/3").write_text("{")
    assert main(("report", "out[b]")) == 0
    said = capsys.readouterr().out
    assert "naive(blocks=[delta])" in said and "naive(blocks=[gla])" in said
    assert "note out[b]/[/b]/3/result.json is not a result file" in said
    assert "report: out[b]/report/report.html" in said


@pytest.mark.usefixtures("no_figures")
def test_what_cannot_be_read_keeps_no_other_run_out_of_mlflow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr("cl.tracking.sync", lambda run_dir, uri: sent.append((str(run_dir), uri)))
    for folder in ("1", f"mlartifacts/{'0' * 32}/artifacts", "3"):
        a_result(f"out/{folder}")
    a_result("out/2").write_text("{")
    assert main(("report", "out", "sync=http://me:secret@host")) == 0
    assert sent == [("out/1", "http://me:secret@host"), ("out/3", "http://me:secret@host")]
    said = capsys.readouterr().out
    assert "2 runs are in http://me:***@host" in said and "out/2/result.json is not a result file" in said


@pytest.mark.usefixtures("no_figures")
def test_the_way_to_the_curves_names_the_store_that_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    a_result("out/1", mlflow_run_id="0" * 32)
    assert main(("report", "out")) == 0
    assert "`cl ui`" in capsys.readouterr().out
    groups: dict[str, Any] = {name: {} for name in PARTS} | {"tracking": {"uri": "sqlite:///other.db"}}
    Path("out/1/config.yaml").write_text(json.dumps(groups))
    assert main(("report", "out")) == 0
    assert "`cl ui uri=sqlite:///other.db`" in capsys.readouterr().out


def test_the_journal_has_the_points_of_the_tracker(tmp_path: Path) -> None:
    node = {"_target_": "cl.tracking.MLflowTracker", "uri": f"sqlite:///{tmp_path}/runs.db", "every_steps": 7}
    journal, tracker = _recorders({"tracking": node}, tmp_path, "")
    assert journal.every_steps == tracker.every_steps == 7


def test_a_narrow_terminal_folds_names_and_cuts_no_number() -> None:
    half = Estimate(0.5, 0.25, 0.75)
    metrics, name = {"final": half, "forgetting_max": half}, "+".join(["replay_distillation"] * 3)
    row = StrategyRow("toy", "accuracy", name, (0, 1), metrics, difference=half, p_holm=0.5)
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table("toy", [row]))
    said = console.file.getvalue()
    assert "50.0 [25.0, 75.0]" in said and "+50.0 [+25.0, +75.0]" in said and "0.500" in said and "…" not in said


@pytest.mark.slow
def test_through_hydras_launcher(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("compare", *TINY, "strategies=naive,replay", "seeds=2", "launcher=joblib", "strategy.replay.capacity=50")
    assert main(words) == 0, capfd.readouterr().out
    assert sorted(results()) == ["naive/seed-0", "naive/seed-1", "replay/seed-0", "replay/seed-1"]
    assert "replay" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("strategies=naive", "strategies=[naive]"),
        ("strategies=naive,[derpp,ewc]", "strategies=[naive,[derpp,ewc]]"),
        ("strategies=[naive,derpp]", "strategies=[naive,derpp]"),
        ("seeds=5", "seeds=5"),
        ("seeds=1,2", "seeds=[1,2]"),
    ],
)
def test_lists_are_written_as_people_write_them(word: str, written: str) -> None:
    assert split_words([word]) == ([written], [])
