"""The suite must fail when the code is wrong: one deliberate mistake at a time, in a copy of the package.

Every mistake is tried in a fork of this process, which has torch and triton already: importing them takes longest.
"""

import importlib
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch

import kernels

ROOT = Path(next(iter(kernels.__path__)))
HERE = Path(__file__).parent
RIDGE = "ridge_memory/numba_loops.py"
NEWTON, SEQUENTIAL, ATTENTION = "newton_rnn", "sequential_rnn", "recurrent_attention"
LOOPS = "common/numba_matrix_loops.py"
# file, text, replacement, case whose agreement must break (None: harmless), backend
MUTATIONS = [
    ("common/decay.py", "factors = (run_MC,", "factors = (run_MC * 0,", "gla_scalar", "chunked"),
    ("common/decay.py", ".mul_(self.lower).sum(1)", ".sum(1)", "gated_deltanet", "chunked"),
    ("common/decay.py", "return p.tril_(-1) if strict else p", "return p.tril_(-1)", "gla_scalar", "chunked"),
    ("common/channel_decay.py", "x_MCK.neg().exp_()", "x_MCK.exp()", "gla_channel", "chunked"),
    (
        "common/channel_decay.py",
        "self.upper.mT @ out_MCK + total[:, None]",
        "self.upper.mT @ out_MCK",
        "kda",
        "chunked",
    ),
    ("delta_rule/chunked.py", "torch.bmm(inverse_n.mT, dd_n", "torch.bmm(inverse_n, dd_n", "deltanet", "chunked"),
    ("delta_rule/chunked.py", ", value=-1).mul_(scale_MC1)", ").mul_(scale_MC1)", "normalized", "chunked"),
    ("linear_scan/chunked.py", "gate[0, first] = 0", "pass", "scan_real", "chunked"),
    ("linear_scan/chunked.py", ".conj().resolve_conj().contiguous(), h", ".contiguous(), h", "scan_complex", "chunked"),
    ("common/varlen.py", "padded.index_fill_(", "padded.clone().index_fill_(", None, "chunked"),
    (
        "common/triton_device.py",
        "else i[:, None] >= i[None, :]\n",
        "else i[:, None] > i[None, :]\n",
        "gla_scalar",
        "triton",
    ),
    ("common/triton_device.py", "(s >= middle[:, None])", "(s > middle[:, None])", "gla_channel", "triton"),
    ("common/triton_device.py", "before = tl.cumsum(m, 1) - m", "before = tl.cumsum(m, 1)", "gated_deltanet", "triton"),
    ("gated_linear_attention/triton.py", "g_ptr, t0 + 1, end", "g_ptr, t0, end", "gla_scalar", "triton"),
    ("delta_rule/triton_inverse.py", "inverse -= tl.dot(below", "inverse += tl.dot(below", "deltanet", "triton"),
    ("common/triton_chunks.py", "r * (dy - y", "r * (dy + y", "normalized", "triton"),
    ("common/triton_device.py", "tl.rsqrt(squares + 1e-6)", "tl.rsqrt(squares + 1e-2)", "normalized", "triton"),
    ("linear_scan/triton.py", "(i < end) & (i > 0)", "(i < end)", "scan_real", "triton"),
    # the part of lambda's gradient; the second k of y; the token's own key in H; the same in Triton
    ("ridge_memory/implicit.py", ".mul_(-ratio / 2)", ".mul_(0)", "ridge", "chunked"),
    ("ridge_memory/implicit.py", "dk_y + 2 * dq_y", "dk_y + dq_y", "ridge", "chunked"),
    ("ridge_memory/chunked.py", "decay.mask_MCC * -step", "decay.mask_MCC.tril(-1) * -step", "ridge", "chunked"),
    ("ridge_memory/triton.py", "decay_mask(g, False, C)", "decay_mask(g, True, C)", "ridge", "triton"),
    ("neural_memory/chunked.py", "moving @ speed, moving", "speed, moving", "titans_linear", "chunked"),
    ("neural_memory/chunked.py", "keep * valid.mT", "keep", "titans_linear", "chunked"),
    ("neural_memory/schedule.py", "start = where(entered, now, start)", "start = now", "titans_linear", "chunked"),
    ("neural_memory/walk.py", "start = where(rows, ", "start = where([True] * len(rows), ", "titans_mlp", "chunked"),
    ("neural_memory/walk.py", "c.into[:, :, -1:])", "c.into[:, :, -1:] ** 0)", "linear_decay", "chunked"),
    ("neural_memory/normed.py", ".addcmul_(scale, n)", ".add_(n)", "ttt_norm", "chunked"),
    ("neural_memory/normed.py", "keepdim=True).mul_(r)", "keepdim=True).mul_(0)", "ttt_norm", "chunked"),
    ("neural_memory/numba_loops.py", "if n < chunk", "if n < 0", "titans_linear", "numba"),
    ("neural_memory/numba_adjoint.py", "if not is_chunk", "if n < 0", "titans_mlp", "numba"),
    ("neural_memory/triton.py", "piece.k @ start[0]", "piece.k @ now[0]", "linear_decay", "triton"),
    ("neural_memory/triton_layer.py", "p *= tl.load(slowed_ptr + z)", "p *= 1.0", "titans_linear", "triton"),
    ("neural_memory/triton_layer_adjoint.py", "-to_state - scores", "-scores", "titans_mlp", "triton"),
    ("memory_cache/chunked.py", "running_sum(route_k, starts)", "running_sum(route_k)", "cache_gated", "chunked"),
    ("memory_cache/chunked.py", "outs[n] = outs[n] * found[1]", "pass", "cache_sparse", "chunked"),
    ("memory_cache/routed.py", "argsort(stable=True)", "argsort(stable=True, descending=True)", "routed", "chunked"),
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
    (f"{NEWTON}/adjoint.py", ".addcmul_(x, t)", "", "newton_lstm", "chunked"),
    (f"{NEWTON}/adjoint.py", "t[0] = h[1] = 1", "t[0] = h[0] = 1", "newton_lstm", "chunked"),
    ("linear_scan/chunked.py", "product[:, :-1] *= chunks[:, 1:, 0]", "pass", "newton_gru", "chunked"),
    (f"{NEWTON}/cells.py", 'addcmul(p["gate"], p["r"]', 'addcmul(p["gate"], 0 * p["r"]', "newton_gru", "chunked"),
    (f"{NEWTON}/cells.py", "u += self.recur.back(1, dr)", "pass", "newton_block_gru", "chunked"),
    # Newton only changes how fast, never what: a wrong derivative costs iterations and nothing else
    (f"{NEWTON}/cells.py", ".addcmul_(c - h, dz)", ".addcmul_(c - h, 0.9 * dz)", None, "chunked"),
    (f"{NEWTON}/triton_walk.py", "if residual <= tolerance:", "if residual <= 1e9:", "newton_gru", "triton"),
    (f"{NEWTON}/triton_adjoint.py", "mask=mask & (t > bos)", "mask=mask", "newton_gru", "triton"),
    (f"{NEWTON}/triton_adjoint.py", "tl.where(keep, nh, 0.0), wh)", "nh, wh)", "newton_lstm", "triton"),
    (f"{NEWTON}/triton_block.py", "if residual <= tolerance:", "if residual <= 1e9:", "newton_block_gru", "triton"),
    (f"{NEWTON}/triton_block_adjoint.py", "+ inner * d", "", "newton_block_gru", "triton"),
    (f"{NEWTON}/triton_block_adjoint.py", "along(ch, carry_h", "along(ch, carry_c", "newton_block_lstm", "triton"),
    (f"{SEQUENTIAL}/chunked.py", "adjoint[-1] += dh_t", "pass", "sequential_gru", "chunked"),
    (f"{SEQUENTIAL}/chunked.py", "state = state.index_fill", "state.index_fill", "sequential_slstm", "chunked"),
    (f"{SEQUENTIAL}/chunked_cells.py", 'p["written"], out', 'p["carried"], out', "sequential_slstm", "chunked"),
    (f"{SEQUENTIAL}/chunked_cells.py", "r_back = self.r.mT", "r_back = 2 * self.r.mT", "sequential_lstm", "chunked"),
    (
        f"{SEQUENTIAL}/order.py",
        "self.begins[begin] + hit] = 0",
        "self.begins[begin]] *= 1",
        "sequential_gru",
        "chunked",
    ),
    (f"{SEQUENTIAL}/m2rnn_chunked.py", "leaving.index_fill_(1, order.forgets[t], 0)", "pass", "m2rnn", "chunked"),
    (f"{ATTENTION}/tiles.py", "(number & -number) * chunk", "chunk", ATTENTION, "chunked"),
    (f"{ATTENTION}/tiles.py", ".sub_(along[:, now])", "", ATTENTION, "chunked"),
    (f"{ATTENTION}/tiles.py", "at < own[..., None]", "at <= own[..., None]", ATTENTION, "chunked"),
    (f"{ATTENTION}/call.py", "(dz * z).mean(-1, keepdim=True), value=-1", "z, value=0", ATTENTION, "chunked"),
    (f"{ATTENTION}/call.py", "dv[:, one] += ", "dv[:, one] -= ", f"{ATTENTION}_alibi", "chunked"),
    (f"{SEQUENTIAL}/triton.py", "active = (t < length)", "active = (t <= length)", "sequential_lstm", "triton"),
    (f"{SEQUENTIAL}/numba_loops.py", "u += dh[t, head]", "pass", "sequential_gru", "numba"),
    (f"{SEQUENTIAL}/numba_loops.py", "+ left * is_carried", "+ left", "sequential_slstm", "numba"),
    (f"{SEQUENTIAL}/numba_m2rnn.py", "adjoint[m, i] *= gate", "pass", "m2rnn", "numba"),
    (LOOPS, "dbeta[t0 + n, head] = of_step", "dbeta[t0 + n, head] = 0", "deltanet", "numba"),
    (LOOPS, "+= along[n] * tokens[n, KEY, i]", "+= 0", "gla_scalar", "numba"),
    (LOOPS, "of_q * by[n, QUERY] * by[n, QUERY]", "of_q * by[n, QUERY]", "normalized", "numba"),
    (LOOPS, "v.store(v.times(keep[m], d), u_at, place)", "v.store(d, u_at, place)", "kda", "numba"),
    ("common/numba.py", "for i in range(many, row.size)", "for i in range(0)", "sequential_lstm", "numba"),
    ("common/numba.py", "-of_size if x < 0", "of_size if x < 0", "sequential_lstm", "numba"),
    (RIDGE, "kept[rows[s] + piece, head]", "kept[rows[s], head]", "ridge", "numba"),
    (RIDGE, "of_norm = -how[0]", "of_norm = how[0]", "ridge", "numba"),
    (RIDGE, "of_z, xs[n])", "of_z, zs[n])", "ridge", "numba"),
    (f"{SEQUENTIAL}/triton_adjoint.py", "g1 = u * (h - value)", "g1 = u * (value - h)", "sequential_gru", "triton"),
    (f"{SEQUENTIAL}/triton_m2rnn.py", "* (1 - z * z)", "* (1 - z)", "m2rnn", "triton"),
]
# a part of all loops compiled for a CPU, which are not made anew when it changes
BUILT_IN = "common/numba.py"
HARMLESS = {"common": "gla_scalar", NEWTON: "newton_gru"}


def attempt(place: Path, case: str, backend: str) -> bool:
    """Whether the case still agrees with its token loop, by the package in `place`."""
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        del sys.modules[name]
    for name in ("kernel_properties", "memory_cases", "rnn_cases", "attention_cases", "all_cases"):
        del sys.modules[name]
    sys.path[:0] = [str(place), str(HERE)]
    importlib.invalidate_caches()
    props, found = importlib.import_module("kernel_properties"), importlib.import_module("all_cases").ALL[case]
    assert Path(sys.modules["kernels.linear_scan"].__file__).is_relative_to(place)
    cu = [0, 5, 21, 40]
    options = found.tiles if backend == "triton" else {"chunk": 4 if found.timeless else 16}
    packed = {"cu_seqlens": torch.tensor(cu)}
    if found.has_reset:
        packed["reset"] = torch.zeros(1, 40, dtype=torch.bool)
        packed["reset"][0, [9, 30]] = True
    try:
        inputs = props.draw(found, 40, "cos 0.5", cu)
        props.assert_agrees(found, inputs, backend, torch.float32, **packed, **options)
        if found.timeless:
            # long memories, so that Newton's chunks do depend on their start
            props.assert_agrees(found, props.draw(found, 40, "cos 0.5 slow"), backend, torch.float32, **options)
    except AssertionError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def torch_is_whole():
    """Every fork would import this for itself, at its first call of an op: five times as long as all the rest takes."""
    importlib.import_module("torch._dynamo")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m[0]}: {m[2].strip()}" for m in MUTATIONS])
def test_mistake_is_noticed(mutation, tmp_path):
    file, old, new, case, backend = mutation
    # what was compiled comes along, for only the text that changes is compiled anew; not what others are just writing
    unwanted = ["*.pyc.*", "*.tmp.*"] + ["*.nb?"] * (backend != "numba" or file == BUILT_IN)
    shutil.copytree(ROOT, tmp_path / "kernels", ignore=shutil.ignore_patterns(*unwanted))
    path = tmp_path / "kernels" / file
    source = path.read_text()
    assert old in source, f"the mutation no longer applies to {file}"
    path.write_text(source.replace(old, new))
    child = os.fork()
    if child == 0:
        try:
            agrees = attempt(tmp_path, case or HARMLESS[file.split("/")[0]], backend)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0 if agrees else 17)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # the harmless rewrites must pass: a suite that always fails proves nothing
    assert code == (0 if case is None else 17)
