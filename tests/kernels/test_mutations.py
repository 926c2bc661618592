"""The suite must fail when the code is wrong: one deliberate mistake at a time, in a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(next(iter(kernels.__path__)))
# file, text, replacement, case whose agreement must break, backend
MUTATIONS = [
    ("common/chunks.py", "factors = (run_MC,", "factors = (run_MC * 0,", "gla_scalar", "chunked"),
    ("common/chunks.py", ".mul_(self.lower).sum(1)", ".sum(1)", "gated_deltanet", "chunked"),
    ("common/chunks.py", "return p.tril_(-1) if strict else p", "return p.tril_(-1)", "gla_scalar", "chunked"),
    ("common/chunks.py", "x_MCK.neg().exp_()", "x_MCK.exp()", "gla_channel", "chunked"),
    ("common/chunks.py", "self.upper.mT @ out_MCK + total[:, None]", "self.upper.mT @ out_MCK", "kda", "chunked"),
    ("delta_rule/chunked.py", "torch.bmm(inverse_n.mT, dd_n", "torch.bmm(inverse_n, dd_n", "deltanet", "chunked"),
    ("delta_rule/chunked.py", ", value=-1).mul_(scale_MC1)", ").mul_(scale_MC1)", "normalized", "chunked"),
    ("linear_scan/chunked.py", "gate[0, first] = 0", "pass", "scan_real", "chunked"),
    ("linear_scan/chunked.py", ".conj().resolve_conj().contiguous(), h", ".contiguous(), h", "scan_complex", "chunked"),
    ("common/varlen.py", "padded.masked_fill_(", "padded.clone().masked_fill_(", None, "chunked"),
    ("common/triton.py", "else i[:, None] >= i[None, :]\n", "else i[:, None] > i[None, :]\n", "gla_scalar", "triton"),
    ("common/triton.py", "(s >= middle[:, None])", "(s > middle[:, None])", "gla_channel", "triton"),
    ("common/triton.py", "before = tl.cumsum(m, 1) - m", "before = tl.cumsum(m, 1)", "gated_deltanet", "triton"),
    ("gated_linear_attention/triton.py", "g_ptr, t0 + 1, end", "g_ptr, t0, end", "gla_scalar", "triton"),
    ("delta_rule/triton_inverse.py", "inverse -= tl.dot(below", "inverse += tl.dot(below", "deltanet", "triton"),
    ("common/triton_chunks.py", "r * (dy - y", "r * (dy + y", "normalized", "triton"),
    ("common/triton.py", "tl.rsqrt(squares + 1e-6)", "tl.rsqrt(squares + 1e-2)", "normalized", "triton"),
    ("linear_scan/triton.py", "(i < end) & (i > 0)", "(i < end)", "scan_real", "triton"),
    # the part of lambda's gradient; the second k of y; the token's own key in H; the same in Triton
    ("ridge_memory/implicit.py", ".mul_(-ratio / 2)", ".mul_(0)", "ridge", "chunked"),
    ("ridge_memory/implicit.py", "dk_y + 2 * dq_y", "dk_y + dq_y", "ridge", "chunked"),
    ("ridge_memory/chunked.py", "decay.mask_MCC * -step", "decay.mask_MCC.tril(-1) * -step", "ridge", "chunked"),
    ("ridge_memory/triton.py", "decay_mask(g, False, C)", "decay_mask(g, True, C)", "ridge", "triton"),
    ("neural_memory/chunked.py", "moving @ speed, moving", "speed, moving", "titans_linear", "chunked"),
    ("neural_memory/chunked.py", "keep * piece.valid.mT", "keep", "titans_linear", "chunked"),
    ("neural_memory/schedule.py", "start = _where(entered, now, start)", "start = now", "titans_mlp", "chunked"),
    ("neural_memory/triton.py", "piece.k @ start[0]", "piece.k @ now[0]", "linear_decay", "triton"),
    ("memory_cache/chunked.py", "keys.cumsum(1)", "keys.sum(1, keepdim=True) + 0 * keys", "cache_gated", "chunked"),
    ("memory_cache/chunked.py", "outs[n] = outs[n] * found[1]", "pass", "cache_sparse", "chunked"),
    ("memory_cache/routed.py", "argsort(stable=True)", "argsort(stable=True, descending=True)", "routed", "chunked"),
]
SCRIPT = """
import sys, importlib.util, torch
def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
props = load("kernel_properties")
CASES = {**props.CASES, **load("memory_cases").MEMORY_CASES}
case, backend = CASES[sys.argv[2]], sys.argv[3]
cu = [0, 5, 21, 40]
inputs = props.draw(case, 40, "cos 0.5", cu)
options = {"chunk": 16} if case.is_matrix or backend == "chunked" else {}
try:
    props.assert_agrees(case, inputs, backend, torch.float32, cu_seqlens=torch.tensor(cu), **options)
except AssertionError:
    sys.exit(17)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m[0]}: {m[2].strip()}" for m in MUTATIONS])
def test_mistake_is_noticed(mutation, tmp_path):
    file, old, new, case, backend = mutation
    shutil.copytree(ROOT, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "kernels" / file
    source = path.read_text()
    assert old in source, f"the mutation no longer applies to {file}"
    path.write_text(source.replace(old, new))
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), case or "gla_scalar", backend]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    # the one harmless rewrite must pass: a suite that always fails proves nothing
    assert done.returncode == (0 if case is None else 17), done.stdout + done.stderr
