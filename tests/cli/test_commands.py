"""The commands as a person uses them, through the real entry point."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cl.cli import run as run_command
from cl.cli.listing import kernels
from cl.cli.main import COMMANDS, main
from cl.cli.run import show_result
from cl.result import Result

TINY = ("tracking=none", "debug=tiny")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said_with_imports(word: str) -> str:
    """What a command prints, and then which heavy packages it imported."""
    code = f"import sys; from cl.cli.main import main; main([{word!r}]); print({{'torch', 'hydra'}} & set(sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.rstrip()


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    said = said_with_imports("--help")
    assert all(command in said for command in COMMANDS)
    assert said.endswith("set()")


def test_list_imports_nothing_heavy() -> None:
    said = said_with_imports("list")
    assert "permuted_mnist" in said and "replay" in said and "linear_scan" in said
    assert said.endswith("set()")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "run"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((command, "--help")) == 0
    assert f"Usage: cl {command}" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_wrong_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cl run --hydra-help | head` once said that the run folder cannot be made."""

    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Left())
    with pytest.raises(BrokenPipeError):
        run_command.main(["--hydra-help"])


def test_a_file_in_the_place_of_the_run_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes").touch()
    assert main(("run", *TINY, "out=notes")) == 2
    assert capsys.readouterr().err == "cl: the run folder notes cannot be made: File exists\n"


def test_run_leaves_the_documented_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("run", *TINY, "strategy=replay", "strategy.replay.capacity=50", "out=out", "seed=3")) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "run.log",
    ]
    result = json.loads(Path("out/result.json").read_text())
    expected = {"schema", "stream", "strategy", "backbone", "setting", "seed", "experiences", "measure", "R", "R_init"}
    expected |= {"metrics", "cost", "env", "status", "mlflow_run_id"}
    assert expected <= set(result)
    assert (result["stream"], result["strategy"], result["backbone"]) == ("permuted_digits", ["replay"], "mlp")
    assert (result["seed"], result["status"], result["schema"]) == (3, "done", 1)
    assert [len(row) for row in result["R"]] == [3, 3, 3]
    costs = "train_samples_per_s eval_samples_per_s forwards backwards updates buffer_bytes peak_memory_bytes"
    assert {*costs.split(), "train_s", "eval_s", "wall_s"} <= set(result["cost"])
    assert result["cost"]["updates"] == 60
    assert result["cost"]["buffer_bytes"] > 50 * 64
    assert "run folder: out" in capsys.readouterr().out


def test_composition_keeps_the_order_of_the_command_line() -> None:
    assert main(("run", *TINY, "limit_experiences=1", "strategy=[replay,naive]", "hydra.run.dir=out")) == 0
    assert Result.load(Path("out/result.json")).strategy == ["replay", "naive"]


def test_a_finished_run_is_not_trained_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("run", *TINY, "limit_experiences=1", "hydra.run.dir=out")) == 0
    before = Path("out/result.json").read_bytes()
    assert main(("resume", "out")) == 0
    assert "this run is done" in capsys.readouterr().out
    assert Path("out/result.json").read_bytes() == before


def test_hydra_flags_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("run", *TINY, "--cfg", "job", "strategy=replay")) == 0
    assert "_target_: strategies.replay.Replay" in capsys.readouterr().out


def test_hydra_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", "-m", *TINY, "limit_experiences=1", "strategy=naive,replay", "seed=0,1", "out=sweep")
    assert main(words) == 0
    results = [Result.load(path) for path in sorted(Path("sweep").glob("*/result.json"))]
    assert sorted((result.label, result.seed) for result in results) == [
        ("naive", 0),
        ("naive", 1),
        ("replay", 0),
        ("replay", 1),
    ]


def test_explain_counts_what_it_declares(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("explain", "debug=tiny", "strategy=replay", "strategy.replay.replay_batch_size=16")) == 0
    said = capsys.readouterr().out
    assert "step 20, experience 'permutation 01'" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["replay", "replay", "16", "1"] in rows
    assert ["forwards", "80", "80"] in rows
    assert ["backwards", "80", "80"] in rows
    assert ["cosine", "between", "the", "two", "1.000000"] in rows
    assert not list(Path().iterdir())


def test_the_step_of_the_help_page_exists() -> None:
    from cl.cli import explain

    (example,) = [line for line in (explain.__doc__ or "").splitlines() if line.startswith("  cl ") and " at=" in line]
    assert main(shlex.split(example)[1:]) == 0


def test_explain_shows_gradients_that_a_strategy_takes_away(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the step, all but the side memories' share: shorter, at a sharp angle to what it was."""
    assert main(("explain", "debug=tiny", "strategy=locas")) == 0
    words = capsys.readouterr().out.splitlines()
    before, after, cosine = (
        float(next(line for line in words if line.startswith(start)).split()[-1])
        for start in ("norm of the gradient", "norm after on_gradients", "cosine between the two")
    )
    # what is left is a part of what there was, orthogonal to what was taken
    assert 0 < after < before and cosine == pytest.approx(after / before, rel=1e-4)


def test_explain_adds_up_the_micro_batches_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("explain", "debug=tiny", "strategy=replay", "strategy.replay.replay_batch_size=16")
    assert main((*words, "trainer.accumulation=4")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (current,) = [row for row in rows if row[:1] == ["current"]]
    (replayed,) = [row for row in rows if row[:2] == ["replay", "replay"] and len(row) == 4]
    assert [int(current[-2]), int(replayed[-2])] == [4 * 64, 16] and current[-1] == replayed[-1] == "1"
    assert ["forwards", "272", "272"] in rows and ["backwards", "272", "272"] in rows


def test_doctor_finds_this_machine_healthy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert main(("doctor",)) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "data digits" in said and "mlflow store" in said
    assert said.count("auto takes reference") == len(list(kernels()))


def test_table_of_r_is_headed_by_one_line_and_names_what_no_row_names(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(experiences: list[str], domains: list[str]) -> list[str]:
        rows: list[list[float | None]] = [[1.0] * len(domains)] * len(experiences)
        result = Result("s", ["naive"], "b", "s", 0, experiences, domains, [0, 1], "loss", R=rows)
        show_result(Console(width=80), result, Path("out"))
        return capsys.readouterr().out.splitlines()

    said = shown(["docs", "code"], ["docs", "code", "general"])
    assert said[0] == "loss in nats on each domain after each experience"
    assert re.findall(r"\w+", said[2]) == ["after", "0", "1", "general"]
    said = shown(["3 and 7", "0 and 1"], [f"the digit {digit}" for digit in range(10)])
    assert sorted(" ".join(said[1:4]).split()) == sorted(["after", *["the", "digit"] * 10, *"0123456789"])
    assert said[4].split() == ["0", "3", "and", "7", *["1.000"] * 10]
    many = [f"permutation {k:02d}" for k in range(12)]
    assert shown(many, many)[12].split() == ["10", "permutation", "10", *["1.000"] * 10], "a number was cut"


def test_reproduce_lists_the_claims_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("reproduce", "page=page.md")) == 0
    assert "split_mnist_er_200" in capsys.readouterr().out
    said = Path("page.md").read_text()
    assert "| split_mnist_er_200 |" in said and "| holds |" not in said


def test_third_party_strategy_by_name_of_its_class() -> None:
    Path("my_ideas.py").write_text(
        '"""Mine."""\n'
        "from cl.hooks import Strategy\n\n\n"
        "class Mine(Strategy):\n"
        '    """Shrinks the weights a little after every step."""\n\n'
        "    def __init__(self, rate: float = 0.1) -> None:\n"
        "        self.rate = rate\n\n"
        "    def on_step_end(self, state, batch, output):\n"
        "        for p in state.parameters().values():\n"
        "            p.data.mul_(1 - self.rate)\n"
    )
    run = (*TINY, "limit_experiences=1")
    assert main(("run", *run, "strategy=my_ideas.Mine", "strategy.my_ideas.rate=0.5", "hydra.run.dir=a")) == 0
    assert Result.load(Path("a/result.json")).strategy == ["my_ideas"]
    assert "rate: 0.5" in Path("a/config.yaml").read_text()
    words = ("+strategy.mine._target_=my_ideas.Mine", "+strategy.mine.rate=0.5", "hydra.run.dir=b")
    assert main(("run", *run, *words)) == 0
    first, second = (Result.load(Path(name) / "result.json") for name in "ab")
    assert second.strategy == ["naive", "mine"]
    assert first.R == second.R
