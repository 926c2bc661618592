"""Ridge's own Triton kernel, and what the other memory ops compose of existing ones, in the interpreter."""

import os

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS, OFFSETS
from memory_cases import MEMORY_CASES, ON_TRITON

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")
every = pytest.mark.parametrize("case", [MEMORY_CASES[n] for n in ON_TRITON], ids=ON_TRITON)
ridge = pytest.mark.parametrize("case", [MEMORY_CASES[n] for n in ("ridge", "ridge_mixed")], ids=["ridge", "mixed"])


def chunk_of(case):
    # the neural memory's chunk is the model's
    return {"chunk": 16} if case.name.startswith(("ridge", "cache", "routed")) else {}


@ridge
def test_agrees_with_token_loop(case, nan_scratch):
    props.assert_agrees(case, props.draw(case, 21, "cos 0.5 slow"), "triton", torch.float32, chunk=16)


@every
@pytest.mark.slow
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_all_key_distributions(case, kind, nan_scratch):
    props.assert_agrees(case, props.draw(case, 21, kind), "triton", torch.float32, **chunk_of(case))


@ridge
@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16, 17, 40])
@pytest.mark.parametrize("chunk", [16, 32])
def test_any_length_and_chunk(case, length, chunk):
    props.assert_agrees(case, props.draw(case, length), "triton", torch.float32, chunk=chunk)


@every
@pytest.mark.slow
def test_packed_sequences(case, nan_scratch):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS).items()}
    props.assert_agrees(case, inputs, "triton", torch.float32, cu_seqlens=cu, **chunk_of(case))


def test_packed_ridge(nan_scratch):
    case, cu = MEMORY_CASES["ridge"], [0, 0, 3, 20]
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, 20, "cos 0.5", cu).items()}
    props.assert_agrees(case, inputs, "triton", torch.float32, cu_seqlens=torch.tensor(cu), chunk=16)


@every
@pytest.mark.slow
def test_carry(case):
    inputs = props.cast(props.draw(case, 25, "cos 0.5"), torch.float32)
    whole = props.tensors_of(case, inputs, backend="triton", **chunk_of(case))
    parts = props.tensors_of(props.carried(case, 9), inputs, backend="triton", **chunk_of(case))
    props.assert_close(case, inputs, parts, whole, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(3, 33), (17, 20), (40, 70)])
def test_tiles_of_both_widths(widths):
    case = MEMORY_CASES["ridge"]
    inputs, (k, v) = props.draw(case, 20), widths
    gen = torch.Generator().manual_seed(3)
    for key in ("q", "k"):
        inputs[key] = torch.nn.functional.normalize(torch.randn(2, 20, 2, k, generator=gen), dim=-1)
    inputs["v"] = torch.randn(2, 20, 2, v, generator=gen)
    root = torch.randn(2, 2, k, k, generator=gen)
    inputs["initial_state"] = torch.cat([root @ root.mT / k, torch.randn(2, 2, k, v, generator=gen)], dim=-1)
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)


@every
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_upcast(case, dtype):
    given = props.cast(props.draw(case, 20, "cos 0.5"), dtype)
    found = props.tensors_of(case, given, backend="triton", **chunk_of(case))
    assert found[0].dtype == dtype
    assert all(torch.isfinite(x).all() for x in found)
    props.assert_close(
        case, given, found, props.truth_of(case, given), {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    )


@pytest.mark.slow
def test_bit_equal_runs():
    case = MEMORY_CASES["ridge"]
    inputs = props.cast(props.draw(case, 17), torch.float32)
    first, second = (props.tensors_of(case, inputs, backend="triton", chunk=16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("edge", ["no decay", "wiped", "some wiped", "zero key", "repeated key", "large value"])
@ridge
def test_extremes(case, edge):
    inputs = props.edge_inputs(case, edge)
    if inputs is None:
        pytest.skip("the op has no such input")
    if edge == "wiped":
        # of one token's memory beta cancels out, and its gradient with it: what is left is rounding of its parts
        found = props.tensors_of(case, props.cast(inputs, torch.float32), backend="triton", chunk=16)
        truth = props.truth_of(case, props.cast(inputs, torch.float32))
        return props.assert_close(case, inputs, found, truth, 1e-4)
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)


def test_large_chunk_of_the_model_on_small_chunks_of_the_kernels():
    """One chunk of the model over several of the kernels'."""
    from kernels.neural_memory import neural_memory

    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 1, 4, generator=gen) for _ in range(3))
    beta, g = torch.rand(1, 40, 1, generator=gen) / 20, -torch.rand(1, 40, 1, generator=gen) / 10
    runs = [neural_memory(q, k, v, beta, g, chunk=25, backend=b) for b in ("triton", "chunked")]
    assert props.error(runs[0][0], runs[1][0].double()) < 1e-6
    assert props.error(runs[0][1].start[0], runs[1][1].start[0].double()) < 1e-6
