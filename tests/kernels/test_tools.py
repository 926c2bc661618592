"""The bench and the card check as commands: tried here on tiny shapes, so that on the card they only have to run."""

import importlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from kernels.bench.shapes import PROBLEMS
from kernels.delta_rule import delta_rule


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

    monkeypatch.setattr(bench, "worst_error", lambda *args: 0.5)
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
        ("aot.__main__", ["--targets"], "python -m kernels.aot: argument --targets: expected one argument"),
        ("check_gpu", ["--jobs", "x"], "python -m kernels.check_gpu: argument --jobs: invalid int value: 'x'"),
        ("check_gpu", ["--jobs", "0"], "python -m kernels.check_gpu: jobs is 0; it must be at least 1"),
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

    out, row = tmp_path / "b.json", bench._row

    def until_kda(problem, *arguments):
        if problem.name == "kda":
            raise RuntimeError("out of time")
        return row(problem, *arguments)

    monkeypatch.setattr(bench, "_row", until_kda)
    shapes = ["--shapes", "1x32x1x16", "2x32x1x16"]
    with pytest.raises(RuntimeError, match="out of time"):
        bench.main(["--device", "cpu", "--smoke", "--ops", "deltanet,kda", *shapes, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["B T H D"] for row in rows] == ["1 32 1 16"] * 2 + ["2 32 1 16"] * 2


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
    from kernels.common import triton_chunks

    seen = []
    monkeypatch.setattr(bench, "_row", lambda *_: seen.append(triton_chunks._FUSING) or [{"pass": "fwd"}])
    bench.main(["--smoke", "--device", "cpu", "--ops", "deltanet", flag])
    assert seen == [walks]


def fake_module(monkeypatch, name, **members):
    """A module `name` and its parents, with plain token loops in the place of the peer's kernels."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def mamba_loop(x, dt, A, B, C, chunk_size):
    """Mamba-2 as its paper has it: h = exp(dt A) h + dt B x, y = C h."""
    state, outs = torch.zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3], dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None]
        outs.append((C[:, t][..., None, :] @ state)[..., 0, :])
    return torch.stack(outs, 1)


def scan_loop(gates, tokens):
    """accelerated-scan: [B, C, T] contiguous, T a power of two."""
    assert gates.is_contiguous()
    assert gates.shape[2] & (gates.shape[2] - 1) == 0
    state, outs = torch.zeros_like(tokens[:, :, 0]), []
    for t in range(tokens.shape[2]):
        state = gates[:, :, t] * state + tokens[:, :, t]
        outs.append(state)
    return torch.stack(outs, 2)


def fla_loop(q, k, v, g, beta, scale, output_final_state):
    """fla's chunk_gated_delta_rule by its documentation: [B, T, H, D], log decay, no normalisation by default."""
    return delta_rule(q, k, v, beta, g, scale=scale, backend="reference")


@pytest.mark.parametrize(
    ("peer", "problem", "module", "member", "stand_in"),
    [
        ("mamba-ssm", "gla_scalar", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", mamba_loop),
        ("accelerated-scan", "linear_scan", "accelerated_scan.warp", "scan", scan_loop),
        ("fla", "gated_deltanet", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", fla_loop),
        ("fla-plain", "gated_deltanet", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", fla_loop),
    ],
)
def test_peers_are_given_what_they_mean(peer, problem, module, member, stand_in, monkeypatch):
    """The stand-ins compute the peers' documented equations; the check must accept them, and refuse another one."""
    from kernels.bench.peers import peer_error, peers_of, timed
    from kernels.bench.shapes import PROBLEMS

    torch.manual_seed(0)
    inputs = PROBLEMS[problem].draw((2, 256, 2, 16), torch.float32, torch.device("cpu"))
    fake_module(monkeypatch, module, **{member: stand_in})
    found = peers_of(problem, [peer])[peer]
    assert peer_error(found, PROBLEMS[problem], inputs) < 1e-5
    run, given = timed(found, inputs)
    assert torch.isfinite(run(**given)[0]).all()
    fake_module(monkeypatch, module, **{member: lambda *args, **how: scaled(stand_in(*args, **how))})
    assert peer_error(peers_of(problem, [peer])[peer], PROBLEMS[problem], inputs) > 0.1


def scaled(out):
    return tuple(1.2 * x for x in out) if isinstance(out, tuple) else 1.2 * out


def test_fla_plain_switches_the_other_back_ends_off(monkeypatch):
    from kernels.bench.peers import peers_of

    class BaseBackend:
        @classmethod
        def can_use(cls):
            return True

    seen = []
    fake_module(monkeypatch, "fla.ops.kda", chunk_kda=lambda **how: (seen.append(BaseBackend.can_use()), None))
    backends = types.ModuleType("fla.ops.backends")
    backends.BaseBackend = BaseBackend
    monkeypatch.setitem(sys.modules, "fla.ops.backends", backends)
    for name, allowed in (("fla", True), ("fla-plain", False)):
        peers_of("kda", [name])[name].call(k=torch.ones(1, 1, 1, 4))
        assert seen.pop() is allowed
    assert BaseBackend.can_use()
    assert "FLA_DISABLE_BACKEND_DISPATCH" not in os.environ


@pytest.mark.parametrize("problem", ["newton_gru", "newton_lstm"])
def test_torch_rnn_of_equal_width_is_its_own_truth(problem):
    from kernels.bench.peers import peer_error, peers_of, timed

    inputs = {"x": torch.randn(2, 40, 3, 2, 8)}
    peer = peers_of(problem, ["torch-rnn"])["torch-rnn"]
    assert peer_error(peer, None, inputs) < 1e-5
    run, given = timed(peer, inputs)
    assert run(**given)[0].shape == (2, 40, 16)
    assert {"weight_hh_l0", "weight_ih_l0"} <= set(given)


def test_an_absent_peer_is_no_error():
    from kernels.bench.peers import peers_of

    assert peers_of("gla_scalar", ["torch-rnn"]) == {}


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
    assert {row["kernel"] for row in rows} >= {
        "walk_states",
        "chunk_inverses",
        "scan_segments",
        "walk_outputs",
        "walk_corrected_outputs",
    }
    assert all(row["ok"] for row in rows)


@pytest.mark.slow
def test_check_gpu_in_several_processes_is_the_same(tmp_path):
    rows = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        words = ("--smoke", "--ops", "linear_scan", "--jobs", jobs, "--json", str(out))
        done = run("kernels.check_gpu", *words, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(json.loads(out.read_text())["rows"])
    assert rows[0] == rows[1]


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
