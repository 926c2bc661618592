"""`stream=avalanche/NAME` and `strategy=avalanche/NAME` in every command."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("avalanche")
from cl.cli import listing
from cl.cli.compose import composed, open_signatures, plain
from cl.cli.main import main
from cl.interop.catalog import BENCHMARKS, METHODS, configs

TINY = ("tracking=none", "debug=tiny", "data.root=null")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_lab.py").write_text(
        textwrap.dedent("""
        import torch
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
        from avalanche.training.templates import SupervisedTemplate
        from sklearn.datasets import load_digits
        from torch.utils.data import TensorDataset

        digits = load_digits()
        X, Y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)

        def benchmark(num=3, seed=0):
            def part(first, k):
                rows = torch.arange(len(Y))
                rows = rows[((rows % 5 == 0) == first) & (Y // 2 == k)]
                labels = DataAttribute(Y[rows].tolist(), "targets")
                return AvalancheDataset([TensorDataset(X[rows], Y[rows])], data_attributes=[labels])
            return benchmark_from_datasets(
                train=[part(False, k) for k in range(num)], test=[part(True, k) for k in range(num)]
            )

        class Mine(SupervisedTemplate):
            def __init__(self, strength=1.0, **kwargs):
                super().__init__(**kwargs)
                assert strength == 2.5
        """)
    )


def result(folder: str) -> dict:
    return json.loads((Path(folder) / "result.json").read_text())


def test_run_leaves_a_run_like_any_other() -> None:
    words = ("run", *TINY, "strategy=avalanche/Replay", "strategy.avalanche/Replay.mem_size=50", "hydra.run.dir=out")
    assert main(words) == 0
    found = result("out")
    assert (found["strategy"], found["backbone"], found["status"]) == (["avalanche_Replay"], "mlp", "done")
    assert [len(row) for row in found["R"]] == [3, 3, 3] and found["cost"]["updates"] == 60
    assert found["cost"]["buffer_bytes"] > 0
    assert main(("report", "out")) == 0
    assert Path("out/report/report.html").is_file()


def test_runs_are_paired_by_seed() -> None:
    """Their naive training is ours, number for number."""
    for name in ("naive", "avalanche/Naive"):
        assert main(("run", *TINY, f"strategy={name}", f"hydra.run.dir={name[-5:]}", "seed=3")) == 0
    assert result("naive")["R"] == result("Naive")["R"]
    assert result("naive")["R_init"] == result("Naive")["R_init"]


def test_stream_and_template_of_the_users() -> None:
    words = ("stream=avalanche/my_lab.benchmark", "stream.num=4", "strategy=avalanche/my_lab.Mine")
    assert main(("run", *TINY, *words, "strategy.avalanche/Mine.strength=2.5", "hydra.run.dir=out")) == 0
    found = result("out")
    assert (found["stream"], found["strategy"]) == ("avalanche_benchmark", ["avalanche_Mine"])
    assert found["setting"] == "class_incremental" and len(found["R"]) == 3, "debug=tiny takes three of the four"


def test_our_strategies_on_their_stream() -> None:
    words = ("stream=avalanche/my_lab.benchmark", "strategy=[replay,ewc]")
    assert main(("run", *TINY, *words, "hydra.run.dir=out")) == 0
    assert result("out")["strategy"] == ["replay", "ewc"]


def test_resume_goes_on_at_the_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    from cl.interop._host import HostingTrainer

    words = ("run", *TINY, "strategy=avalanche/AGEM")
    assert main((*words, "hydra.run.dir=whole")) == 0
    after_step = HostingTrainer.after_step

    def stopping(self, step, *rest):
        if self.state.step == 45:
            self.request_stop()
        after_step(self, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(HostingTrainer, "after_step", stopping)
        assert main((*words, "hydra.run.dir=halves")) == 1
    assert result("halves")["status"] == "interrupted" and len(result("halves")["R"]) == 2
    assert main(("resume", "halves")) == 0
    assert result("halves")["R"] == result("whole")["R"]


@pytest.mark.slow
def test_compare_ours_and_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    names = "strategies=naive,avalanche/Naive,avalanche/EWC,avalanche/my_lab.Mine"
    options = ("strategy.avalanche/EWC.ewc_lambda=3", "strategy.avalanche_Mine.strength=2.5")
    assert main(("compare", *TINY, names, "seeds=2", "jobs=2", "out=out", *options)) == 0
    folders = sorted(path.name for path in Path("out").iterdir() if path.is_dir())
    assert {"naive", "avalanche_Naive", "avalanche_EWC", "avalanche_Mine"} <= set(folders)
    for seed in (0, 1):
        assert result(f"out/naive/seed-{seed}")["R"] == result(f"out/avalanche_Naive/seed-{seed}")["R"]
    assert "avalanche_EWC" in capsys.readouterr().out


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    entries = {entry.name: entry for entry in listing.avalanche()}
    assert set(entries) == {f"strategy=avalanche/{n}" for n in METHODS} | {f"stream=avalanche/{n}" for n in BENCHMARKS}
    assert "Does not run" in entries["strategy=avalanche/BiC"].line
    assert main(("list", "avalanche")) == 0
    assert "strategy=avalanche/EWC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("strategy=avalanche/EWC", "strategy.avalanche/EWC.strength=1"),
            "no option 'strength'; its options are ewc_l",
        ),
        (("strategy=avalanche/BiC",), "does not run: it gives an experience other data"),
        (("strategy=avalanche/Nope",), "there is no strategy/avalanche 'Nope'; there are AETraining"),
        (("stream=avalanche/SplitMNST",), "no stream/avalanche 'SplitMNST' (did you mean SplitMNIST?)"),
        (("strategy=[avalanche/Naive,replay]",), "alone"),
        (("strategy=avalanche/Naive", "trainer.checkpoint_every=3"), "trainer.checkpoint_every is 3"),
        (("strategy=avalanche/no.such.Thing",), "cannot be imported"),
        (("stream=avalanche/my_lab.nothing",), "cannot be imported"),
        (("stream=avalanche/my_lab.benchmark", "stream.n=3"), "its options are num=3, seed=0"),
        (("strategy=avalanche/PNNStrategy",), "task_incremental"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_requests_are_one_sentence(words, said, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("run", *TINY, *words)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1


def test_explain_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("explain", *TINY, "strategy=avalanche/Naive")) == 2
    assert "neither composed nor explained" in capsys.readouterr().err


def test_every_config_composes() -> None:
    """Strategies all at once, since a composition takes as many as it is given."""
    named = {kind: [name for group, name in configs() if group.startswith(kind)] for kind in ("strategy", "stream")}
    words = f"strategy=[{','.join(f'avalanche/{name}' for name in named['strategy'])}]"
    found = plain(composed("run", [words]))["strategy"]
    assert list(found) == [f"avalanche_{name}" for name in named["strategy"]]
    assert all(node["_target_"].startswith("cl.interop.avalanche.") for node in found.values())
    for name in named["stream"]:
        node = plain(composed("run", ["data.root=/data", f"stream=avalanche/{name}"]))["stream"]
        assert node["_target_"].startswith("cl.interop.avalanche.")
        assert (node["root"], node["seed"]) == ("/data", 0)


def test_sweeps_and_words() -> None:
    assert open_signatures(["strategy=avalanche/EWC,replay"]) == ["strategy=avalanche/EWC,replay"]
    assert open_signatures(["strategy.avalanche/EWC.ewc_lambda=2"]) == ["++strategy.avalanche_EWC.ewc_lambda=2"]
    assert open_signatures(["stream=avalanche/a.b"]) == ["stream=avalanche/own", "++stream.name=a.b"]
    mine = "++strategy.avalanche_C={_target_: cl.interop.avalanche.Own, template: a.b.C}"
    assert open_signatures(["strategy=[replay,avalanche/a.b.C]"]) == ["strategy=[replay]", mine]


@pytest.mark.slow
def test_classic_benchmark_on_real_data() -> None:
    import os

    from cl.cli import compose

    root = os.environ.get("CL_DATA_ROOT") or str(Path(compose.__file__).resolve().parents[3] / "shared" / "data")
    if not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {root}")
    words = ("stream=avalanche/SplitMNIST", f"data.root={root}", "strategy=avalanche/ICaRL", "debug=tiny")
    assert main(("run", "tracking=none", *words, "hydra.run.dir=out")) == 0
    assert len(result("out")["R"]) == 3
