"""Loops compiled for a CPU: what every op must do, and the functions of a number that they are made of."""

from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from all_cases import each
from kernel_properties import CASES, DISTRIBUTIONS, OFFSETS
from rnn_cases import RNN_CASES

np = pytest.importorskip("numpy")
pytest.importorskip("numba")

from kernels.common import explain, numba  # noqa: E402
from kernels.delta_rule import delta_rule  # noqa: E402
from kernels.gated_linear_attention import gated_linear_attention  # noqa: E402
from kernels.sequential_rnn import m2rnn, sequential_rnn  # noqa: E402

CELLS = [case for case in RNN_CASES.values() if not case.name.startswith("newton")]
MATRICES = [case for case in CASES.values() if not case.name.startswith("scan")]
COMPILED = CELLS + MATRICES
every = each(COMPILED)
fp32_and_fp64 = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
numba_only = {"backend": "numba"}


def packing(cu):
    return {} if cu is None else {"cu_seqlens": torch.tensor(cu, dtype=torch.int32)}


@every
@fp32_and_fp64
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("cu", [None, OFFSETS], ids=["dense", "packed"])
def test_agrees_with_token_loop(case, dtype, kind, cu):
    length = case.length if cu is None else cu[-1]
    props.assert_agrees(case, props.draw(case, length, kind, cu), "numba", dtype, chunk=8, **packing(cu))


EDGES = props.edges_of(COMPILED)


@pytest.mark.parametrize(("case", "edge"), EDGES, ids=[f"{case.name}-{edge}" for case, edge in EDGES])
@fp32_and_fp64
def test_extremes(case, edge, dtype):
    props.assert_agrees(case, props.edge_inputs(case, edge), "numba", dtype, chunk=16)


@every
@pytest.mark.parametrize("length", [1, 2, 17])
def test_any_length_and_without_initial_state(case, length):
    inputs = props.draw(case, length)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "numba", torch.float64, chunk=4)


@every
@pytest.mark.parametrize("cut", [1, 15, 16])
def test_carry_is_exact(case, cut):
    """One token after the other: where a call ends changes not a bit of what it says, and the rounding of gradients."""
    inputs = props.cast(props.draw(case, 32, "cos 0.5"), torch.float32)
    whole = props.tensors_of(case, inputs, **numba_only)
    parts = props.tensors_of(props.carried(case, cut), inputs, **numba_only)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    props.assert_close(case, inputs, parts, whole, 1e-6)


@every
def test_packed_is_separate_calls(case):
    cu = [0, 5, 5, 6, 19]
    inputs = props.draw(case, cu[-1], "cos 0.5", cu)
    out, final = case.op(**inputs, **packing(cu), **numba_only)
    for s, (begin, end) in enumerate(pairwise(cu)):
        start = inputs["initial_state"][s : s + 1]
        if begin == end:
            assert torch.equal(final[s : s + 1], start)
            continue
        alone, last = case.op(**props.cut(case, inputs, slice(begin, end)), initial_state=start, **numba_only)
        assert torch.equal(out[:, begin:end], alone)
        assert torch.equal(final[s : s + 1], last)


@each(CELLS)
@pytest.mark.parametrize("cu", [None, [0, 6, 30]], ids=["dense", "packed"])
def test_reset_forgets(case, cu):
    inputs = props.draw(case, 30, "cos 0.5", cu)
    reset = torch.zeros(2 if cu is None else 1, 30, dtype=torch.bool)
    reset[0, 7] = reset[0, 20] = reset[-1, 0] = True
    options = {"reset": reset, **packing(cu)}
    found = props.tensors_of(case, inputs, chunk=4, **numba_only, **options)
    props.assert_close(case, inputs, found, props.truth_of(case, inputs, **options), 1e-10)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs_are_computed_in_float32(case, dtype):
    given = props.cast(props.draw(case, 40), dtype)
    found = props.tensors_of(case, given, **numba_only)
    assert [x.dtype for x in found] == [dtype, torch.float32, *(x.dtype for x in given.values())]
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    props.assert_close(case, given, found, props.truth_of(case, given), tolerance)


@every
def test_threads_change_nothing(case, monkeypatch):
    monkeypatch.setattr(numba, "WORTH", 0)
    inputs = props.cast(props.draw(case, OFFSETS[-1], cu=OFFSETS), torch.float32)
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(props.tensors_of(case, inputs, **numba_only, **packing(OFFSETS)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@every
@pytest.mark.parametrize("cu", [None, OFFSETS], ids=["dense", "packed"])
def test_nothing_uninitialised_and_bit_equal(case, cu, nan_scratch):
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, cu=cu).items()}
    runs = [props.tensors_of(case, inputs, chunk=8, **numba_only, **packing(cu)) for _ in "12"]
    assert all(torch.isfinite(x).all() for x in runs[0])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@every
def test_any_strides_and_nothing_is_written(case):
    inputs = props.draw(case, 20)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    before = {n: x.clone() for n, x in strided.items()}
    plain = props.tensors_of(case, inputs, **numba_only)
    assert all(torch.equal(x, y) for x, y in zip(plain, props.tensors_of(case, strided, **numba_only), strict=True))
    assert all(torch.equal(x, before[n]) for n, x in strided.items())


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "numba") for case in COMPILED), *((case, "chunked") for case in CELLS)],
    ids=lambda x: getattr(x, "name", x),
)
def test_what_is_no_number_is_not_hidden(case, backend):
    """One NaN among the tokens: what comes before does not feel it, its own head does from there on."""
    inputs = props.draw(case, 12)
    tokens = inputs["x" if "x" in inputs else "k"]
    tokens[0, 6, ..., 1, :] = float("nan")
    out, final = case.op(**inputs, backend=backend)
    assert torch.isfinite(out[:, :6]).all()
    assert torch.isfinite(out[:, :, 0]).all()
    assert torch.isnan(out[0, 6:, 1]).all()
    assert torch.isnan(final[0]).any()


@pytest.mark.parametrize("cell", ["slstm", "slstm_exp"])
@pytest.mark.parametrize("gate", [-300.0, 300.0])
def test_slstm_gates_of_any_size(cell, gate):
    """The first input gate sets the scale, and cancels."""
    gen = torch.Generator().manual_seed(0)
    x, r = torch.randn(1, 9, 4, 2, 3, generator=gen), torch.zeros(4, 2, 3, 3)
    shifted = (x + torch.tensor([gate, 0, 0, 0]).view(4, 1, 1)).requires_grad_()
    h, state = sequential_rnn(shifted, r, cell=cell, backend="numba")
    plain, _ = sequential_rnn(x.double(), r.double(), cell=cell, backend="reference")
    assert props.error(h, plain) < 1e-4  # x itself is rounded at 300
    assert torch.isfinite(torch.autograd.grad(h.sum() + state.sum(), shifted)[0]).all()


def test_of_two_equal_scales_the_carried_one_is_the_maximum():
    x = torch.zeros(1, 2, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    _, state = sequential_rnn(x, torch.zeros(4, 1, 1, 1, dtype=torch.float64), cell="slstm_exp", backend="numba")
    (grad,) = torch.autograd.grad(state[:, 2].sum(), x)
    assert grad.flatten(1).tolist() == [[1, 0, 0, 0, 0, 1, 0, 0]]


def test_m2rnn_clips_the_gradient_of_the_state():
    """One unit, f = 1: the gradient of S is carried unchanged, so every step adds dy q and is cut at the bound."""
    one = torch.ones(1, 5, 1, 1, dtype=torch.float64)
    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    given = (one, one, one, torch.ones(1, 5, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    for clip, truth in ((None, 5.0), (2.5, 2.5), (10.0, 5.0)):
        o, _ = m2rnn(*given, initial_state=start, clip=clip, chunk=4, backend="numba")
        assert torch.autograd.grad(o.sum(), start)[0].item() == truth


# who runs


def test_a_cpu_takes_the_loops_until_a_step_is_wide():
    x, r = torch.zeros(2, 3, 3, 1, 8), torch.zeros(3, 1, 8, 8)
    assert explain(sequential_rnn, x, r).backend == "numba"
    at, beyond = (explain(sequential_rnn, x[:1].expand(n, 3, 3, 1, 8), r).backend for n in (128, 129))
    assert (at, beyond) == ("numba", "chunked")
    assert explain(sequential_rnn, x.expand(2, 3, 3, 1, 8), r, backend="numba").reason == "asked for"


def test_a_cpu_takes_the_loops_for_narrow_matrices_and_enough_tokens():
    """Loops over a matrix are compiled for one size."""

    def chosen(tokens, width, op=delta_rule, gates=0):
        q = torch.zeros(1, 1, 1, 1).expand(1, tokens, 2, width)
        g = [None, q[..., 0], q][gates]
        return explain(op, q, q, q, *[q[..., 0]] * (op is delta_rule), g).backend

    assert [chosen(2048, 32), chosen(2047, 32), chosen(8192, 16)] == ["numba", "chunked", "numba"]
    for op, gates in ((delta_rule, 0), (delta_rule, 2), (gated_linear_attention, 1), (gated_linear_attention, 2)):
        assert [chosen(8192, width, op, gates) for width in (64, 65)] == ["numba", "chunked"]


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (17, 9), (1, 1)])
@pytest.mark.parametrize("name", ["gla_channel", "normalized"])
def test_matrices_of_any_shape(shape, name):
    """One vector a row and several, full and not."""
    gen, (width, height) = torch.Generator().manual_seed(1), shape
    case = CASES[name]
    q, k = torch.randn(2, 2, 11, 2, width, generator=gen, dtype=torch.float64)
    inputs = {"q": q, "k": k, "v": torch.randn(2, 11, 2, height, generator=gen, dtype=torch.float64)}
    g = -torch.rand(2, 11, 2, width, generator=gen, dtype=torch.float64)
    inputs |= {"g": g} if name == "gla_channel" else {"g": g[..., 0], "beta": g[..., 0].exp()}
    inputs["initial_state"] = torch.randn(2, 2, width, height, generator=gen, dtype=torch.float64)
    found = props.tensors_of(case, inputs, chunk=4, **numba_only)
    props.assert_close(case, inputs, found, props.truth_of(case, inputs), 1e-10)


def test_without_the_package_torch_runs_and_who_asks_is_told(monkeypatch):
    monkeypatch.setattr("kernels.common.dispatch.HAS_NUMBA", False)
    x, r = torch.zeros(2, 3, 3, 1, 8), torch.zeros(3, 1, 8, 8)
    assert explain(sequential_rnn, x, r).backend == "chunked"
    with pytest.raises(ValueError, match="backend 'numba' needs the package numba, which is not installed; use"):
        sequential_rnn(x, r, backend="numba")


def test_ops_without_loops_and_other_devices_are_refused():
    from kernels.linear_scan import linear_scan

    one = torch.ones(1, 2, 1)
    with pytest.raises(ValueError, match="linear_scan: backend 'numba' has no loops of this op; use backend='chunked'"):
        linear_scan(one, one, backend="numba")
    x, r = torch.zeros(2, 3, 3, 1, 8, device="meta"), torch.zeros(3, 1, 8, 8, device="meta")
    with pytest.raises(ValueError, match="backend 'numba' needs CPU tensors, got meta"):
        explain(sequential_rnn, x, r, backend="numba")


def test_where_nothing_can_be_kept_the_loop_is_compiled_all_the_same(monkeypatch):
    seen = []

    def njit(**how):
        if how.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: seen.append(how) or loop

    monkeypatch.setattr(numba, "njit", njit)
    assert numba.compiled(len) is len
    assert seen[0]["nogil"]


# functions of a number


@numba.compiled
def _applied(first, last, which, x, out):
    one = x.dtype.type(1)
    for i in range(first, last):
        if which == 0:
            out[i] = numba.exp(x[i])
        elif which == 1:
            out[i] = numba.tanh(x[i])
        elif which == 2:
            out[i] = numba.sigmoid(x[i], one)
        else:
            out[i] = numba.log_sigmoid(x[i], one)


FUNCTIONS = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_are_exact_to_a_few_units_in_the_last_place(name, dtype):
    x = np.concatenate([np.linspace(-80, 80, 20_001), np.geomspace(1e-30, 1, 500), -np.geomspace(1e-30, 1, 500)])
    x = np.asarray(-abs(x) if name == "exp" else x, dtype)
    found, truth = np.empty_like(x), FUNCTIONS[name](x.astype(np.longdouble))
    numba.spread(_applied, len(x), 0, list(FUNCTIONS).index(name), x, found)
    wrong = abs(found - truth) / np.maximum(abs(truth), np.finfo(dtype).tiny)
    assert wrong.max() < 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_far_out(dtype):
    x, found = np.asarray([-np.inf, -1e30, np.nan], dtype), np.empty(3, dtype)
    for which, truth in enumerate(([0, 0], [-1, -1], [0, 0], [-np.inf, np.float32(-1e30)])):
        numba.spread(_applied, 3, 0, which, x, found)
        np.testing.assert_allclose(found[:2], truth, rtol=1e-6)
        assert np.isnan(found[2])
