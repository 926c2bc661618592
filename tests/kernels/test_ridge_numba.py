"""Ridge memory's compiled loops: against the token loop that solves exactly, and step for step against the chunks."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from all_cases import each
from kernel_properties import DISTRIBUTIONS, OFFSETS
from memory_cases import MEMORY_CASES

pytest.importorskip("numba")

from kernels.common import explain, numba
from kernels.ridge_memory import ridge_memory

every = each([MEMORY_CASES["ridge"], MEMORY_CASES["ridge_mixed"]])
fp32_and_fp64 = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
unit = partial(torch.nn.functional.normalize, dim=-1)


def packing(cu):
    return {} if cu is None else {"cu_seqlens": torch.tensor(cu, dtype=torch.int32)}


def drawn(length, keys, values, dtype, heads=2, rows=2):
    """All inputs that there are, as leaves."""
    rand = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    inputs = {n: unit(torch.randn(rows, length, heads, keys, **rand)) for n in "qk"}
    inputs["v"] = torch.randn(rows, length, heads, values, **rand)
    inputs |= {n: torch.rand(rows, length, heads, **rand) for n in ("beta", "g", "mix")}
    inputs["g"] = -inputs["g"] / 5
    root = torch.randn(rows, heads, keys, keys, **rand)
    inputs["initial_state"] = torch.cat([root @ root.mT, torch.randn(rows, heads, keys, values, **rand)], -1)
    return {n: x.to(dtype).requires_grad_() for n, x in inputs.items()}


def outcome(inputs, **options):
    """Outputs, last state and all gradients."""
    out, final = ridge_memory(**inputs, **options)
    gen = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x) for x in (out, final)]
    return [out, final, *torch.autograd.grad([out, final], list(inputs.values()), cotangents)]


def solved(inputs, backend):
    """The same of the solves alone: the read has loops of its own, which would be compiled too."""
    leaves = [inputs[name] for name in ("q", "k", "beta", "g", "initial_state")]
    *given, state = leaves
    h0 = state[..., : state.shape[2]]
    how = (None, 0.02, 1e-6, 30, 32, backend, False, True)
    x, final, *_ = torch.ops.cl_kernels.ridge_solve(*given, (h0 + h0.mT) / 2, *how)
    gen = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y) for y in (x, final)]
    return [x, final, *torch.autograd.grad([x, final], leaves, cotangents)]


def assert_equal_up_to_rounding(inputs, tolerance, **options):
    found, truth = (outcome(inputs, backend=backend, **options) for backend in ("numba", "chunked"))
    names = ["output", "final_state", *inputs]
    errors = {n: props.error(x, y) for n, x, y in zip(names, found, truth, strict=True)}
    assert max(errors.values()) < tolerance, errors


# against solves that are exact


@every
@fp32_and_fp64
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("cu", [None, OFFSETS], ids=["dense", "packed"])
def test_agrees_with_token_loop(case, dtype, kind, cu):
    length = case.length if cu is None else cu[-1]
    props.assert_agrees(case, props.draw(case, length, kind, cu), "numba", dtype, chunk=8, **packing(cu))


EDGES = props.edges_of([MEMORY_CASES["ridge"], MEMORY_CASES["ridge_mixed"]])


@pytest.mark.parametrize(("case", "edge"), EDGES, ids=[f"{case.name}-{edge}" for case, edge in EDGES])
@fp32_and_fp64
def test_extremes(case, edge, dtype):
    given = props.cast(props.edge_inputs(case, edge), dtype)
    found = props.tensors_of(case, given, backend="numba", chunk=16)
    # of one token's memory beta cancels out, and its gradient with it: what is left is rounding of its parts
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4 if edge == "wiped" else 1e-5
    props.assert_close(case, given, found, props.truth_of(case, given), tolerance)


@every
@pytest.mark.parametrize("length", [1, 2, 17])
def test_any_length_and_without_initial_state(case, length):
    inputs = props.draw(case, length)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "numba", torch.float64, chunk=4)


def test_decays_of_nothing():
    """exp(-inf): what was before a token is forgotten, and neither it nor g feels what comes after."""
    case = MEMORY_CASES["ridge"]
    inputs = props.draw(case, 20)
    inputs["g"][:, 6] = inputs["g"][:, 13] = float("-inf")
    found, truth = props.tensors_of(case, inputs, backend="numba", chunk=8), props.truth_of(case, inputs)
    props.assert_close(case, inputs, found, truth, 1e-10)


def test_without_keys_lambda_is_the_floor():
    """H = 0 for three tokens: x = q / floor, lambda does not move, and the state still has a gradient."""
    case = MEMORY_CASES["ridge"]
    inputs = props.draw(case, 8)
    inputs["k"][:, :3] = 0
    inputs["initial_state"][..., :5] = 0
    with_floor = replace(case, op=partial(ridge_memory, ratio=0.1, steps=60, floor=0.5))
    found, truth = props.tensors_of(with_floor, inputs, backend="numba"), props.truth_of(with_floor, inputs)
    props.assert_close(case, inputs, found, truth, 1e-10)
    q, u = inputs["q"][:, :1], inputs["initial_state"][..., 5:] * inputs["g"][:, 0, :, None, None].exp()
    assert props.error(found[0][:, :1], torch.einsum("bthk,bhkv->bthv", q / 0.5, u)) < 1e-12


# step for step


@fp32_and_fp64
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_takes_the_steps_of_the_chunks(dtype, steps):
    """Far from converged they agree too."""
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}[dtype]
    assert_equal_up_to_rounding(drawn(37, 5, 7, dtype), tolerance, steps=steps, chunk=8)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        (17, torch.float32),
        (32, torch.float32),
        pytest.param(48, torch.float32, marks=pytest.mark.slow),
        pytest.param(66, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_widths(keys, dtype):
    """Whole vectors and not, few in a row and more than are summed at once; four, three and one token in turns."""
    found, truth = (solved(drawn(41, keys, 6, dtype), backend) for backend in ("numba", "chunked"))
    errors = [props.error(x, y) for x, y in zip(found, truth, strict=True)]
    assert max(errors) < {torch.float64: 1e-12, torch.float32: 2e-5}[dtype], errors


@pytest.mark.parametrize("missing", ["beta", "g", "mix", "initial_state"])
def test_what_may_be_left_out(missing):
    inputs = drawn(19, 5, 7, torch.float64)
    del inputs[missing]
    assert_equal_up_to_rounding(inputs, 1e-12, chunk=8)


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_chunks_change_nothing(chunk):
    """They say which states are kept: the walk between them is the same."""
    inputs = drawn(21, 5, 7, torch.float32)
    runs = [outcome({**inputs}, chunk=c, backend="numba")[2:] for c in (8, chunk)]
    # the read of U goes in chunks of its own
    assert max(props.error(x, y) for x, y in zip(*runs, strict=True)) < 2e-6


# what every op does


@every
def test_packed_is_separate_calls(case):
    cu = [0, 5, 5, 6, 19]
    inputs = props.draw(case, cu[-1], "cos 0.5", cu)
    out, final = case.op(**inputs, **packing(cu), backend="numba")
    for s, (begin, end) in enumerate(pairwise(cu)):
        start = inputs["initial_state"][s : s + 1]
        if begin == end:
            assert torch.equal(final[s : s + 1], start)
            continue
        alone, last = case.op(**props.cut(case, inputs, slice(begin, end)), initial_state=start, backend="numba")
        assert props.error(out[:, begin:end], alone) < 1e-12
        assert props.error(final[s : s + 1], last) < 1e-12


@every
@pytest.mark.parametrize("cut", [1, 15, 16])
def test_carried_state(case, cut):
    inputs = props.draw(case, 32, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="numba")
    parts = props.tensors_of(props.carried(case, cut), inputs, backend="numba")
    props.assert_close(case, inputs, parts, whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    case = MEMORY_CASES["ridge"]
    given = props.cast(props.draw(case, 40), dtype)
    found = props.tensors_of(case, given, backend="numba")
    assert [x.dtype for x in found] == [dtype, torch.float32, *(x.dtype for x in given.values())]
    props.assert_close(
        case, given, found, props.truth_of(case, given), {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    )


@every
def test_threads_change_nothing(case, monkeypatch):
    monkeypatch.setattr(numba, "WORTH", 0)
    inputs = props.cast(props.draw(case, OFFSETS[-1], cu=OFFSETS), torch.float32)
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(props.tensors_of(case, inputs, backend="numba", **packing(OFFSETS)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@every
@pytest.mark.parametrize("cu", [None, OFFSETS], ids=["dense", "packed"])
def test_nothing_uninitialised_and_bit_equal(case, cu, nan_scratch):
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, cu=cu).items()}
    runs = [props.tensors_of(case, inputs, chunk=8, backend="numba", **packing(cu)) for _ in "12"]
    assert all(torch.isfinite(x).all() for x in runs[0])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@every
def test_any_strides_and_nothing_is_written(case):
    inputs = props.draw(case, 20)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    before = {n: x.clone() for n, x in strided.items()}
    plain = props.tensors_of(case, inputs, backend="numba")
    props.assert_close(case, inputs, props.tensors_of(case, strided, backend="numba"), plain, 1e-12)
    assert all(torch.equal(x, before[n]) for n, x in strided.items())


def test_memory_of_backward():
    """Kept: the inputs, x, and the chunk states of H and U."""
    inputs = {n: x.float().requires_grad_() for n, x in props.draw(MEMORY_CASES["ridge"], 256).items()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        ridge_memory(**inputs, backend="numba", chunk=32)
    given = sum(x.numel() for x in inputs.values())
    assert sum(x.numel() for x in kept.values()) <= 2 * given + 2 * 2 * 8 * 5 * (5 + 7)


# who runs


def test_a_cpu_takes_the_loops_where_there_is_enough_to_do():
    """2^22 multiplications a step are worth compiling; heads beyond 128 were not measured."""
    x = torch.zeros(1, 1024, 4, 32)
    assert explain(ridge_memory, x, x, x).backend == "numba"
    assert explain(ridge_memory, x[:, 1:], x[:, 1:], x[:, 1:]).backend == "chunked"
    wide = torch.zeros(1, 1024, 1, 129)
    assert explain(ridge_memory, wide, wide, wide).backend == "chunked"
    assert explain(ridge_memory, wide[..., :128], wide[..., :128], wide).backend == "numba"
    assert explain(ridge_memory, wide, wide, wide, backend="numba").reason == "asked for"


def test_who_asks_for_what_cannot_run_is_told(monkeypatch):
    far = torch.zeros(1, 3, 2, 4, device="meta")
    with pytest.raises(ValueError, match="ridge_memory: backend 'numba' needs CPU tensors, got meta; use backend="):
        explain(ridge_memory, far, far, far, backend="numba")
    monkeypatch.setattr("kernels.common.dispatch.HAS_NUMBA", False)
    x = torch.zeros(1, 1024, 4, 32)
    assert explain(ridge_memory, x, x, x).backend == "chunked"
    with pytest.raises(ValueError, match="backend 'numba' needs the package numba, which is not installed"):
        ridge_memory(x, x, x, backend="numba")


@pytest.mark.parametrize("is_weighted", [True, False])
def test_compiled_graph_knows_the_shapes(is_weighted):
    x = torch.randn(1, 9, 2, 5, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    beta = torch.rand(1, 9, 2, dtype=torch.float64, requires_grad=True) if is_weighted else None
    given = (x, x, beta, None, start, None, 0.1, 1e-6, 30, 8, "numba", False, True)
    torch.library.opcheck(torch.ops.cl_kernels.ridge_solve.default, given)
