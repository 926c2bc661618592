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
    (
        "common/chunks.py",
        "g_MCG).exp_()\n        self.out",
        "g_MCG * 0).exp_()\n        self.out",
        "gla_scalar",
        "chunked",
    ),
    ("common/chunks.py", "return p.tril_(-1) if strict else p", "return p.tril_(-1)", "gla_scalar", "chunked"),
    ("common/chunks.py", "[:, width:, :width]", "[:, :width, width:]", "gla_channel", "chunked"),
    ("common/chunks.py", "self.gate(out_MCK) + total[:, None]", "self.gate(out_MCK)", "kda", "chunked"),
    ("delta_rule/chunked.py", "upper=transposed", "upper=False", "deltanet", "chunked"),
    ("linear_scan/chunked.py", "gate[0, first] = 0", "pass", "scan_real", "chunked"),
    ("linear_scan/chunked.py", ".conj().resolve_conj().contiguous(), h", ".contiguous(), h", "scan_complex", "chunked"),
    ("common/varlen.py", "padded.masked_fill_(", "padded.clone().masked_fill_(", None, "chunked"),
    ("common/triton.py", "else i[:, None] >= i[None, :]\n", "else i[:, None] > i[None, :]\n", "gla_scalar", "triton"),
    ("common/triton.py", "(s >= middle[:, None])", "(s > middle[:, None])", "gla_channel", "triton"),
    ("common/triton.py", "before = tl.cumsum(m, 1) - m", "before = tl.cumsum(m, 1)", "gated_deltanet", "triton"),
    ("gated_linear_attention/triton.py", "g_ptr, t0 + 1, end", "g_ptr, t0, end", "gla_scalar", "triton"),
    ("delta_rule/triton.py", "inverse -= tl.dot(below", "inverse += tl.dot(below", "deltanet", "triton"),
    ("linear_scan/triton.py", "(i < end) & (i > 0)", "(i < end)", "scan_real", "triton"),
]
SCRIPT = """
import sys, importlib.util, torch
spec = importlib.util.spec_from_file_location("kernel_properties", sys.argv[1])
props = importlib.util.module_from_spec(spec); sys.modules["kernel_properties"] = props; spec.loader.exec_module(props)
case, backend = props.CASES[sys.argv[2]], sys.argv[3]
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
    properties = str(Path(__file__).with_name("kernel_properties.py"))
    command = [sys.executable, "-c", SCRIPT, properties, case or "gla_scalar", backend]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    # the one harmless rewrite must pass: a suite that always fails proves nothing
    assert done.returncode == (0 if case is None else 17), done.stdout + done.stderr
