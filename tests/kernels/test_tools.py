"""The bench and the card check as commands: tried here on tiny shapes, so that on the card they only have to run."""

import json
import os
import subprocess
import sys

import pytest


def run(module, *arguments, **variables):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=env)


def test_bench_writes_both_tables(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench cpu -->\nold\n<!-- end cpu -->\nafter\n")
    paths = ["--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md"), "--readme", str(readme)]
    done = run("kernels.bench", "--smoke", "--device", "cpu", *paths)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == 12
    assert all(row["ms"] > 0 and float(row["max rel err"]) < 1e-5 for row in rows)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| kda |" in text


def test_bench_refuses_to_time_a_wrong_result(monkeypatch, capsys):
    from kernels.bench import __main__ as bench

    monkeypatch.setattr(bench, "worst_error", lambda *args: 0.5)
    assert bench.main(["--smoke", "--device", "cpu", "--ops", "deltanet"]) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_bench_names_the_allowed_ops(capsys):
    from kernels.bench.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--ops", "attention"])
    assert stop.value.code == 2
    assert "unknown ops 'attention'; use linear_scan" in capsys.readouterr().err


def test_check_gpu_says_when_there_is_no_card():
    done = run("kernels.check_gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout


@pytest.mark.slow
def test_check_gpu_runs_in_the_interpreter(tmp_path):
    out = tmp_path / "c.json"
    done = run("kernels.check_gpu", "--smoke", "--json", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {"walk_states", "chunk_inverses", "scan_segments"}
    assert all(row["ok"] for row in rows)


def test_launcher_honours_the_deny_list(monkeypatch, tmp_path):
    from kernels.common import triton

    rows = [triton.row(BK=16, warps=4), triton.row(BK=16, warps=8)]
    monkeypatch.setattr(triton, "CACHE", tmp_path)
    monkeypatch.setattr(triton, "INTERPRET", False)
    monkeypatch.setattr(triton.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "device_tag", lambda: "sm_90|triton 3.8.0")
    assert triton.allowed("k", rows) == rows
    triton.deny("sm_90|triton 3.8.0", {("k", str(rows[0]))})
    assert triton.allowed("k", rows) == rows[1:]
    triton.deny("sm_90|triton 3.8.0", {("k", str(r)) for r in rows})
    with pytest.raises(RuntimeError, match="every configuration failed"):
        triton.allowed("k", rows)
