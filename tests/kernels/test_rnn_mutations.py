"""The suite must fail when the nonlinear recurrences are wrong: one deliberate mistake at a time, in a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(next(iter(kernels.__path__)))
NEWTON, SEQUENTIAL = "newton_rnn", "sequential_rnn"
# file, text, replacement, case whose agreement must break (None: harmless), backend
MUTATIONS = [
    (f"{NEWTON}/chunked.py", "if residual <= tolerance:", "if True:", "newton_gru", "chunked"),
    (
        f"{NEWTON}/chunked.py",
        "return [part.index_put(at, value) for",
        "return state or [part for",
        "newton_lstm",
        "chunked",
    ),
    (f"{NEWTON}/adjoint.py", "entry[b, t - begin] = 0", "pass", "newton_gru", "chunked"),
    (f"{NEWTON}/adjoint.py", "part[b, t - begin] += d", "pass", "newton_lstm", "chunked"),
    (f"{NEWTON}/cells.py", '.addcmul_(cross, p["into"])', "", "newton_lstm", "chunked"),
    (f"{NEWTON}/cells.py", 'addcmul(p["gate"], p["r"]', 'addcmul(p["gate"], 0 * p["r"]', "newton_gru", "chunked"),
    (f"{NEWTON}/cells.py", "u += self.recur.back(1, dr)", "pass", "newton_block_gru", "chunked"),
    # Newton only changes how fast, never what: a wrong derivative costs iterations and nothing else
    (f"{NEWTON}/cells.py", ".addcmul_(c - h, dz)", ".addcmul_(c - h, 0.9 * dz)", None, "chunked"),
    (f"{NEWTON}/triton.py", "if residual <= tolerance:", "if residual <= 1e9:", "newton_gru", "triton"),
    (f"{NEWTON}/triton_adjoint.py", "mask=mask & (t > bos)", "mask=mask", "newton_gru", "triton"),
    (f"{NEWTON}/triton_adjoint.py", "tl.where(keep, nh, 0.0), wh)", "nh, wh)", "newton_lstm", "triton"),
    (f"{SEQUENTIAL}/chunked.py", "active[-1] += dh[:, at : at + n]", "pass", "sequential_gru", "chunked"),
    (f"{SEQUENTIAL}/chunked.py", "carried += past", "pass", "sequential_slstm", "chunked"),
    (f"{SEQUENTIAL}/chunked.py", "r_back = self.r.mT", "r_back = 2 * self.r.mT", "sequential_lstm", "chunked"),
    (
        f"{SEQUENTIAL}/order.py",
        "self.begins[begin] + hit] = 0",
        "self.begins[begin]] *= 1",
        "sequential_gru",
        "chunked",
    ),
    (f"{SEQUENTIAL}/m2rnn_chunked.py", "leaving.index_fill_(1, order.forgets[t], 0)", "pass", "m2rnn", "chunked"),
    (f"{SEQUENTIAL}/triton.py", "active = (t < length)", "active = (t <= length)", "sequential_lstm", "triton"),
    (f"{SEQUENTIAL}/triton_adjoint.py", "g1 = u * (h - value)", "g1 = u * (value - h)", "sequential_gru", "triton"),
    (f"{SEQUENTIAL}/triton_m2rnn.py", "* (1 - z * z)", "* (1 - z)", "m2rnn", "triton"),
]
SCRIPT = """
import sys, importlib.util, torch
for name in ("kernel_properties", "rnn_cases"):
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/{name}.py")
    module = importlib.util.module_from_spec(spec); sys.modules[name] = module; spec.loader.exec_module(module)
props, case, backend = sys.modules["kernel_properties"], sys.modules["rnn_cases"].RNN_CASES[sys.argv[2]], sys.argv[3]
cu = [0, 3, 17, 40]
reset = torch.zeros(1, 40, dtype=torch.bool); reset[0, 9] = reset[0, 30] = True
chunk = 16 if backend == "triton" else 4
try:
    inputs = props.draw(case, 40, "cos 0.5", cu)
    props.assert_agrees(case, inputs, backend, torch.float32, cu_seqlens=torch.tensor(cu), reset=reset, chunk=chunk)
    # long memories, so that chunks do depend on their start
    dense = props.draw(case, 40, "cos 0.5 slow")
    props.assert_agrees(case, dense, backend, torch.float32, chunk=chunk)
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
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), case or "newton_gru", backend]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    # the one harmless change must pass: a suite that always fails proves nothing
    assert done.returncode == (0 if case is None else 17), done.stdout + done.stderr
