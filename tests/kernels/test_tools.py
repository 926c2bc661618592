"""The bench and the card check as commands: tried here on tiny shapes, so that on the card they only have to run."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels.bench.shapes import PROBLEMS


def run(module, *arguments, **variables):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_bench_writes_both_tables(tmp_path):
    readme = tmp_path / "README.md"
    marks = ("cpu kda,deltanet", "cpu kda short", "cuda kda", "cpu kda,attention")
    readme.write_text(
        "\n".join(f"<!-- bench {mark} -->\nold {mark}\n<!-- end bench -->" for mark in marks) + "\nafter\n"
    )
    paths = ["--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md"), "--readme", str(readme)]
    done = run("kernels.bench", "--smoke", "--device", "cpu", *paths)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    # forward, and forward with backward
    assert len(rows) == 2 * len(PROBLEMS)
    assert all(row["ms"] > 0 and float(row["max rel err"]) < 1e-5 for row in rows)
    wide, short, other_device, unknown = readme.read_text().split("<!-- end bench -->")[:4]
    assert wide.count("| kda |") == wide.count("| deltanet |") == short.count("| kda |") == 2
    assert "python -m kernels.bench --smoke" in wide
    assert "Mtok/s" in wide
    assert "Mtok/s" not in short
    assert "x loop cpu" in short
    # what was not measured stays
    assert "old cuda kda" in other_device
    assert "old cpu kda,attention" in unknown
    assert readme.read_text().endswith("after\n")


def test_bench_refuses_to_time_a_wrong_result(monkeypatch, capsys):
    from kernels.bench import __main__ as bench
    from kernels.bench import rows

    monkeypatch.setattr(rows, "judge", lambda *args: lambda: 0.5)
    assert bench.main(["--smoke", "--device", "cpu", "--ops", "deltanet"]) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_bench_names_the_allowed_ops(capsys):
    from kernels.bench.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--ops", "attention"])
    assert stop.value.code == 2
    assert "unknown ops 'attention'; use linear_scan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        ("bench.__main__", ["--nonsense"], "python -m kernels.bench: unrecognized arguments: --nonsense; --help shows"),
        ("bench.__main__", ["--repeats", "0"], "python -m kernels.bench: repeats is 0; it must be at least 1"),
        ("bench.__main__", ["--jobs", "0"], "python -m kernels.bench: jobs is 0; it must be at least 1"),
        ("aot.__main__", ["--targets"], "python -m kernels.aot: argument --targets: expected one argument"),
        ("check_gpu", ["--jobs", "x"], "python -m kernels.check_gpu: argument --jobs: invalid int value: 'x'"),
        ("check_gpu", ["--jobs", "0"], "python -m kernels.check_gpu: jobs is 0; it must be at least 1"),
        (
            "check_gpu",
            ["--patience", "0"],
            "python -m kernels.check_gpu: patience is 0; it must be more than 0 seconds",
        ),
        ("check_gpu", ["--ops", "kda,dka"], "python -m kernels.check_gpu: unknown ops 'dka'; use linear_scan"),
    ],
)
def test_a_wrong_option_is_one_sentence(tool, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"kernels.{tool}").main(words)
    assert stop.value.code == 2
    found = capsys.readouterr().err
    assert found.startswith(said) and found.count("\n") == 1


def test_bench_keeps_what_it_measured_when_a_later_op_ends_it(monkeypatch, tmp_path):
    from kernels.bench import __main__ as bench

    out, row = tmp_path / "b.json", bench.measured

    def until_kda(problem, *arguments):
        if problem.name == "kda":
            raise KeyboardInterrupt
        return row(problem, *arguments)

    monkeypatch.setattr(bench, "measured", until_kda)
    shapes = ["--shapes", "1x32x1x16", "2x32x1x16"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--device", "cpu", "--smoke", "--ops", "deltanet,kda", *shapes, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["B T H D"] for row in rows] == ["1 32 1 16"] * 2 + ["2 32 1 16"] * 2


def test_bench_goes_on_after_an_op_that_fails(monkeypatch, tmp_path):
    from kernels.bench import __main__ as bench

    out, row = tmp_path / "b.json", bench.measured

    def but_kda(problem, *arguments):
        if problem.name == "kda":
            raise RuntimeError("no configuration fits\nthis card")
        return row(problem, *arguments)

    monkeypatch.setattr(bench, "measured", but_kda)
    words = ["--device", "cpu", "--smoke", "--shapes", "1x32x1x16", "--ops", "kda,deltanet", "--json", str(out)]
    assert bench.main(words) == 1
    found = [(row["op"], row["pass"]) for row in json.loads(out.read_text())["rows"]]
    assert found == [
        ("kda", "FAILED: RuntimeError: no configuration fits"),
        ("deltanet", "fwd"),
        ("deltanet", "fwd+bwd"),
    ]


def test_bench_calls_an_op_at_its_size_before_it_is_checked(monkeypatch):
    """A tuner chooses at the first call, and for later ones of all lengths and batches."""
    from kernels.bench import __main__ as bench
    from kernels.bench import rows, shapes

    seen, problem = [], PROBLEMS["deltanet"]

    def op(**inputs):
        seen.append(tuple(inputs["q"].shape))
        return problem.op(**inputs)

    op.plan = problem.op.plan
    monkeypatch.setitem(shapes.PROBLEMS, "deltanet", replace(problem, op=op))
    monkeypatch.setattr(rows, "judge", lambda *given: lambda: float("inf"))
    bench.main(["--device", "cpu", "--smoke", "--shapes", "2x200x3x16", "--ops", "deltanet"])
    assert seen == [(2, 200, 3, 16)]


def test_a_graph_goes_through_all_sets_of_inputs(monkeypatch):
    """Replayed with one, its inputs would come from the cache and not from memory."""
    from kernels.bench import measure

    seen, where = [], []

    @contextmanager
    def capture(graph):
        where.append("graph")
        yield
        where.pop()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {"Stream": lambda: stream, "current_stream": lambda: stream, "graph": capture}.items():
        monkeypatch.setattr(measure.torch.cuda, name, fake)
    monkeypatch.setattr(measure.torch.cuda, "stream", lambda given: nullcontext())
    monkeypatch.setattr(measure.torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(measure, "median_s", lambda replay, device, repeats: 6.0 * repeats)
    sets = [{"x": torch.full((1,), float(k))} for k in range(4)]
    call = measure.passes(lambda x: where and seen.append(float(x)), sets, torch.ones(1), False)
    # six seconds of each of the five replays hold four calls
    assert measure.graph_s(call, torch.device("cuda"), 20, 4) == 6.0 * 5 / 4
    assert sorted(seen) == [0, 1, 2, 3]


def test_bench_fills_tables_from_what_another_run_kept(tmp_path):
    """What a card has measured that gives no more back than a file of numbers."""
    from kernels.bench.__main__ import main

    out, page = tmp_path / "b.json", tmp_path / "page.md"
    page.write_text("<!-- bench cuda kda short -->\nold\n<!-- end bench -->\n")
    row = {"op": "kda", "B T H D": "1 2 3 4", "pass": "fwd", "ms": 0.5}
    out.write_text(json.dumps({"environment": {}, "on": "cuda", "header": "`asked`: device card", "rows": [row]}))
    assert main(["--read", str(out), "--readme", str(page)]) == 0
    assert "| kda | 1 2 3 4 | fwd | 0.5 |" in page.read_text()
    assert "device card" in page.read_text()


def test_bench_says_what_a_shape_is(capsys):
    from kernels.bench.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--shapes", "4x2048"])
    assert stop.value.code == 2
    assert "'4x2048' is no BxTxHxD of four integers, such as 4x2048x16x64" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "walks"), [("--fuse", True), ("--no-fuse", False)])
def test_bench_forces_the_walk(flag, walks, monkeypatch):
    from kernels.bench import __main__ as bench
    from kernels.common import triton_packed

    seen = []
    monkeypatch.setattr(bench, "measured", lambda *_: seen.append(triton_packed._FUSING) or [{"pass": "fwd"}])
    bench.main(["--smoke", "--device", "cpu", "--ops", "deltanet", flag])
    assert seen == [walks]


def test_check_gpu_says_when_there_is_no_card():
    done = run("kernels.check_gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")


@pytest.mark.slow
@interpreted
def test_check_gpu_runs_in_the_interpreter(tmp_path):
    from kernels.check_gpu import main

    assert main(["--smoke", "--json", str(tmp_path / "c.json")]) == 0
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {
        "walk_states",
        "chunk_inverses",
        "scan_segments",
        "walk_outputs",
        "walk_corrected_outputs",
    }
    assert all(row["ok"] for row in rows)


@pytest.mark.slow
@interpreted
def test_check_gpu_in_several_processes_is_the_same(tmp_path):
    from kernels.check_gpu import main

    here, there = tmp_path / "here.json", tmp_path / "there.json"
    words = ["--smoke", "--ops", "linear_scan", "--json"]
    assert main([*words, str(here)]) == 0
    done = run("kernels.check_gpu", *words, str(there), "--jobs", "2", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(there.read_text()) == json.loads(here.read_text())


def test_what_is_kept_of_tuning_is_whole_or_as_it_was(monkeypatch, tmp_path):
    """Other processes on the card read it while it is written, and a full disk must not end them."""
    from kernels.common import triton

    path = tmp_path / "tuned.json"
    triton._write_json(path, {"kept": "row"})
    write = type(path).write_text

    def half(self, text, *arguments, **how):
        write(self, text[: len(text) // 2], *arguments, **how)
        raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(OSError, match="no space"):
        triton._write_json(path, {"kept": "row", "more": "rows"})
    assert json.loads(path.read_text()) == {"kept": "row"}


def test_launcher_honours_the_deny_list(monkeypatch, tmp_path):
    from kernels.common import triton

    rows = [triton.row(BK=16, warps=4), triton.row(BK=16, warps=8)]
    monkeypatch.setattr(triton, "CACHE", tmp_path)
    monkeypatch.setattr(triton, "INTERPRET", False)
    monkeypatch.setattr(triton.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "device_tag", lambda: "sm_90|triton 3.8.0")
    assert triton.allowed("k", rows) == rows
    triton.deny("sm_90|triton 3.8.0", {("k", str(rows[0]))}, whole=True)
    assert triton.allowed("k", rows) == rows[1:]
    triton.deny("sm_90|triton 3.8.0", {("k", str(r)) for r in rows}, whole=True)
    with pytest.raises(RuntimeError, match="every configuration failed"):
        triton.allowed("k", rows)
