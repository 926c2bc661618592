"""`cl explain sensitivity=STEPS` and the sentences of the strategies that finetune, as a person meets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl.cli.main import main
from cl.metrics.sensitivity import Change
from cl.report.axes import DPI
from cl.report.sensitivity_figure import module_sensitivity

SPLIT = ("stream=split_digits", "trainer.max_steps=12", "tracking=none")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_ranks_parameters_and_modules_and_draws_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("explain", *SPLIT, "sensitivity=3", "figure=out/modules.png")) == 0
    said = capsys.readouterr().out
    for name in ("head.weight", "head.bias", "body.1.weight", "body.3.bias"):
        assert f"\n{name} " in said
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in said.splitlines() if line.count(".") > 3}
    assert all(row[2] == pytest.approx(row[0] / row[1], rel=0.05, abs=0.1) for row in rows.values())
    assert Path("out/modules.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in Path().iterdir()] == ["out"], "nothing but the figure is written"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("explain", *SPLIT, "sensitivity=often"), "sensitivity is 'often'; it must be a number of steps between"),
        (("explain", *SPLIT, "sensitivity=0"), "sensitivity is '0'; it must be a number of steps between snapshots"),
        (("explain", *SPLIT, "sensitivity=7"), "sensitivity is 7; it must be at most 6, half of the steps of the"),
        (("explain", *SPLIT, "limit_experiences=1", "sensitivity=2"), "sensitivity needs a switch between experiences"),
        (
            ("run", *SPLIT, "strategy=fpf", "strategy.fpf.modules=[layer4]"),
            "fpf.modules has 'layer4', which matches no module with parameters; the model's modules are head (Linear), "
            "body.1 (Linear), body.3 (Linear)",
        ),
        (
            ("run", *SPLIT, "strategy=fpf", "strategy.fpf.capacity=10"),
            "fpf.replay_batch_size is 32; it must be at most fpf.capacity, 10",
        ),
        (("run", *SPLIT, "strategy=[fpf]", "strategy.fpf.buffer_of=replay"), "fpf.buffer_of is 'replay'; it must be a"),
        (
            ("run", *SPLIT, "strategy=kfpf", "strategy.kfpf.period_steps=1"),
            "kfpf.period_steps is 1; it must be at least 2",
        ),
        (
            ("run", *SPLIT, "strategy=[refresh,replay]", "strategy.refresh.mode=paper"),
            "refresh.mode is 'paper', which unlearns the whole loss, and replay behind it changes the batch",
        ),
        (("run", *SPLIT, "strategy=icarl", "strategy.icarl.capacity=9"), "icarl.capacity is 9; it must be at least 10"),
        (("run", *SPLIT, "strategy=gdumb", "strategy.gdumb.capacity=9"), "gdumb.capacity is 9; it must be at least 10"),
    ],
)
def test_wrong_requests(words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"cl: {sentence}")


def test_figure_has_a_line_and_a_bar_per_name() -> None:
    changes = [Change(k, i, {"head": 4.0 - i, "body": 1.0, "unused": 0.0}) for k in range(3) for i in range(3)]
    figure = module_sensitivity(changes, {"body": 1.0, "head": 2.0, "unused": float("nan")}, 10)
    course, bars = figure.axes
    lines = [line for line in course.get_lines() if len(line.get_xdata()) == 9]
    assert [list(line.get_ydata()) for line in lines] == [[4.0, 3.0, 2.0] * 3, [1.0] * 9]
    assert list(lines[0].get_xdata()) == [10 * (n + 1) for n in range(9)]
    switches = [line.get_xdata()[0] for line in course.get_lines() if len(line.get_xdata()) == 2]
    assert switches == [30, 60]
    assert [bar.get_width() for bar in bars.patches] == [2.0, 1.0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["head", "body"]
    assert figure.get_size_inches()[0] * DPI < 3000
