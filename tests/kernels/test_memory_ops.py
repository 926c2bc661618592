"""Ridge, neural, cached and routed memories, chunked, against their float64 token loops, in every way of calling."""

from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS, OFFSETS
from memory_cases import MEMORY_CASES, NEURAL

every = pytest.mark.parametrize("case", MEMORY_CASES.values(), ids=MEMORY_CASES.keys())


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    props.assert_agrees(case, props.draw(case, 39, kind), "chunked", dtype, chunk=16)


@every
@pytest.mark.parametrize("length", [1, 2, 4, 15, 17])
def test_any_length(case, length):
    props.assert_agrees(case, props.draw(case, length), "chunked", torch.float64, chunk=16)
    props.assert_agrees(case, props.draw(case, length), "chunked", torch.float64)


@every
@pytest.mark.parametrize("cut", [1, 2, 3, 7, 16, 25])
def test_carry(case, cut):
    inputs = props.draw(case, 32, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="chunked", chunk=8)
    parts = props.tensors_of(props.carried(case, cut), inputs, backend="chunked", chunk=8)
    props.assert_close(case, inputs, parts, whole, 1e-10)


@every
def test_carry_of_the_token_loop(case):
    inputs = props.draw(case, 12, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="reference")
    parts = props.tensors_of(props.carried(case, 5), inputs, backend="reference")
    props.assert_close(case, inputs, parts, whole, 1e-10)


@every
def test_packed_sequences(case):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    inputs = props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS)
    props.assert_agrees(case, inputs, "chunked", torch.float64, cu_seqlens=cu, chunk=8)


@every
def test_packed_is_separate_calls(case):
    """Also of the reference, whose packed form has code of its own."""
    cu = [0, 5, 19]
    inputs = props.draw(case, cu[-1], cu=cu)
    for backend in ("chunked", "reference"):
        out, final = case.op(**inputs, cu_seqlens=torch.tensor(cu), backend=backend)
        for s, (a, b) in enumerate(pairwise(cu)):
            own = {n: x[s : s + 1] if n == "initial_state" else x[:, a:b] for n, x in inputs.items()}
            alone, end = case.op(**own, backend=backend)
            assert props.error(out[:, a:b], alone) < 1e-10
            row = final[s : s + 1]
            # the states of cached memories have as many numbers as there are memories, then padding, then the header
            if "cache" in case.name:
                row = torch.cat([row[:, : end.shape[1] - 2], row[:, -2:]], dim=1)
            assert props.error(row, end) < 1e-10


@every
def test_packed_gradients_do_not_leak(case):
    cu = torch.tensor([0, 13, 30])
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 30, cu=[0, 13, 30]).items()}
    out, _ = case.op(**leaves, cu_seqlens=cu, backend="chunked", chunk=8)
    grads = torch.autograd.grad(out[:, 13:].abs().sum(), list(leaves.values()))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if leaf.dim() > 1:
            before = grad[:1] if name == "initial_state" else grad[:, :13]
            assert torch.count_nonzero(before) == 0, f"{case.name}: d{name} of sequence 0 is not exactly zero"


@every
def test_nothing_looks_ahead(case):
    """Outputs before a token do not feel it, in every variant and with a memory that is not empty."""
    inputs = props.draw(case, 20)
    plain, _ = case.op(**inputs, backend="chunked", chunk=8)
    moved = {n: x if n == "initial_state" else torch.cat([x[:, :11], x[:, 11:] + 0.1], 1) for n, x in inputs.items()}
    if "g" in moved:
        moved["g"] = moved["g"] - 0.2
        moved["g"][:, :11] = inputs["g"][:, :11]
    if "momentum" in moved:
        moved["momentum"][:, 11:] -= 0.2
    other, _ = case.op(**moved, backend="chunked", chunk=8)
    assert torch.equal(plain[:, :11], other[:, :11]) or props.error(other[:, :11], plain[:, :11]) < 1e-14
    assert props.error(other[:, 11:], plain[:, 11:]) > 1e-3


@every
def test_without_initial_state(case):
    inputs = props.draw(case, 20)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=8)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs_are_computed_in_float32(case, dtype):
    given = props.cast(props.draw(case, 40), dtype)
    found = props.tensors_of(case, given, backend="chunked")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    props.assert_close(
        case, given, found, props.truth_of(case, given), {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    )


@every
def test_non_contiguous_inputs(case):
    inputs = props.draw(case, 20)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    plain = case.op(**inputs, backend="chunked", chunk=8)
    other = case.op(**strided, backend="chunked", chunk=8)
    assert all(props.error(x, y) < 1e-14 for x, y in zip(plain, other, strict=True))


@every
def test_nothing_uninitialised_and_bit_equal(case, nan_scratch):
    for cu in (None, OFFSETS):
        inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, cu=cu).items()}
        packed = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
        runs = [props.tensors_of(case, inputs, backend="chunked", chunk=16, **packed) for _ in range(2)]
        assert all(torch.isfinite(x).all() for x in runs[0])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@every
@pytest.mark.parametrize("edge", ["no decay", "wiped", "some wiped", "zero key", "repeated key", "large value"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_extremes(case, edge, dtype):
    inputs = props.edge_inputs(case, edge)
    if inputs is None:
        pytest.skip("the op has no such input")
    if edge == "large value" and case.name in NEURAL and case.name not in ("ttt_linear", "linear_decay"):
        pytest.skip("a nonlinear memory explodes on errors of 1e4, in any precision")
    if edge == "wiped" and case.name == "routed":
        pytest.skip("both chosen memories then hold the same token: the router's gradient is 1e-13 of its terms")
    props.assert_agrees(case, inputs, "chunked", dtype, chunk=16)


@every
def test_inputs_are_not_written(case):
    inputs = {n: x[:1].contiguous() for n, x in props.draw(case, 9).items()}
    before = {n: x.clone() for n, x in inputs.items()}
    case.op(**inputs, backend="chunked", chunk=16)
    assert all(torch.equal(before[n], x) for n, x in inputs.items())


@every
def test_second_derivative(case):
    """Refused where the backward is written by hand; there for neural memory, which autograd goes through."""
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 4).items()}
    out, _ = case.op(**leaves, backend="chunked")
    (first,) = torch.autograd.grad(out.square().sum(), [leaves["k"]], create_graph=True)
    if case.name in NEURAL:
        first.abs().sum().backward()
        assert torch.isfinite(leaves["q"].grad).all()
        return
    with pytest.raises(RuntimeError):
        first.abs().sum().backward()


@pytest.mark.slow
@every
def test_long_sequence_float32(case):
    props.assert_agrees(case, props.draw(case, 600, "cos 0.9 slow"), "chunked", torch.float32)
