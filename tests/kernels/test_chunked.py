"""The CPU product: chunked torch against the float64 token loop, in every way it can be called."""

import kernel_properties as props
import pytest
import torch
from kernel_properties import CASES, DISTRIBUTIONS, OFFSETS

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
MATRIX = [case for case in CASES.values() if case.is_matrix]
matrix = pytest.mark.parametrize("case", MATRIX, ids=[case.name for case in MATRIX])


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    props.assert_agrees(case, props.draw(case, 70, kind), "chunked", dtype, chunk=16)


@every
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_any_length(case, length):
    props.assert_agrees(case, props.draw(case, length), "chunked", torch.float64, chunk=16)
    props.assert_agrees(case, props.draw(case, length), "chunked", torch.float64)


@every
def test_chunk_length_does_not_matter(case):
    inputs = props.cast(props.draw(case, 100), torch.float32)
    runs = [props.tensors_of(case, inputs, backend="chunked", chunk=c) for c in (16, 32, 64)]
    for other in runs[1:]:
        props.assert_close(case, inputs, other, runs[0], 1e-6)


@every
@pytest.mark.parametrize("cut", [1, 15, 16, 17, 25])
def test_carry(case, cut):
    inputs = props.draw(case, 50, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="chunked", chunk=16)
    parts = props.tensors_of(props.carried(case, cut), inputs, backend="chunked", chunk=16)
    props.assert_close(case, inputs, parts, whole, 1e-10)


@every
def test_packed_sequences(case):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    inputs = props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS)
    props.assert_agrees(case, inputs, "chunked", torch.float64, cu_seqlens=cu, chunk=8)


@every
def test_packed_gradients_do_not_leak(case):
    cu = torch.tensor([0, 13, 40])
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 40, cu=[0, 13, 40]).items()}
    out, _ = case.op(**leaves, cu_seqlens=cu, backend="chunked", chunk=8)
    grads = torch.autograd.grad(out[:, 13:].abs().sum(), list(leaves.values()))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if leaf.dim() > 1:
            before = grad[:1] if name == "initial_state" else grad[:, :13]
            assert torch.count_nonzero(before) == 0, f"{case.name}: d{name} of sequence 0 is not exactly zero"


@every
def test_sections_do_not_matter(case, monkeypatch):
    monkeypatch.setattr("kernels.common.sections.ROWS", 8)
    props.assert_agrees(case, props.draw(case, 90, "cos 0.5"), "chunked", torch.float64, chunk=8)


@every
def test_without_initial_state(case):
    inputs = props.draw(case, 20)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=8)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs_are_computed_in_float32(case, dtype):
    if case.name == "scan_complex":
        pytest.skip("no 16-bit complex numbers")
    given = props.cast(props.draw(case, 40), dtype)
    found = props.tensors_of(case, given, backend="chunked")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    # what is returned in 16 bits carries one rounding; the scan's da multiplies the rounded h
    props.assert_close(
        case, given, found, props.truth_of(case, given), {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    )


@every
def test_non_contiguous_inputs(case):
    inputs = props.draw(case, 20)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x for n, x in inputs.items()}
    plain = case.op(**inputs, backend="chunked", chunk=8)
    other = case.op(**strided, backend="chunked", chunk=8)
    assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


@every
def test_nothing_uninitialised_and_bit_equal(case, nan_scratch):
    for cu in (None, OFFSETS):
        inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, cu=cu).items()}
        packed = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
        runs = [props.tensors_of(case, inputs, backend="chunked", chunk=16, **packed) for _ in range(2)]
        assert all(torch.isfinite(x.abs()).all() for x in runs[0])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@matrix
@pytest.mark.parametrize("edge", ["no decay", "wiped", "some wiped", "zero key", "repeated key", "large value", "beta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_extremes(case, edge, dtype):
    inputs = props.edge_inputs(case, edge)
    if inputs is None:
        pytest.skip("the op has no such input")
    props.assert_agrees(case, inputs, "chunked", dtype, chunk=16)


@pytest.mark.parametrize("name", ["gla_channel", "kda"])
@pytest.mark.parametrize(("strength", "block"), [(0.1, 16), (1.5, 8), (3.5, 4), (7.0, 2), (20.0, 1)])
def test_decays_per_channel_of_every_strength(name, strength, block, monkeypatch):
    """The harder the decay, the narrower the blocks on the diagonal; each width must be as exact."""
    from kernels.common import chunks

    seen = set()
    make = chunks.ChannelDecay.__init__

    def watched(self, g):
        make(self, g)
        seen.add(self.block)

    monkeypatch.setattr(chunks.ChannelDecay, "__init__", watched)
    inputs = props.draw(CASES[name], 48, "cos 0.5")
    # within a factor of 1.1 of the strength, so that every block of the call has the same width
    inputs["g"] = -strength * (0.9 + 0.2 * torch.rand(inputs["g"].shape, generator=torch.Generator().manual_seed(2)))
    inputs["g"] = inputs["g"].double()
    for dtype in (torch.float64, torch.float32):
        props.assert_agrees(CASES[name], inputs, "chunked", dtype, chunk=16)
    assert seen == {block}


def test_scan_reset_forgets():
    case = CASES["scan_real"]
    inputs = props.draw(case, 12)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 5] = reset[1, 0] = True
    h, _ = case.op(**inputs, reset=reset)
    tail, _ = case.op(inputs["a"][:1, 5:], inputs["u"][:1, 5:])
    torch.testing.assert_close(h[:1, 5:], tail, rtol=1e-12, atol=0)
    fresh, _ = case.op(inputs["a"][1:], inputs["u"][1:])
    torch.testing.assert_close(h[1:], fresh, rtol=1e-12, atol=0)


def test_reset_flags_become_offsets():
    from kernels.common import cu_seqlens_from_reset

    case = CASES["gated_deltanet"]
    inputs = props.draw(case, 10)
    del inputs["initial_state"]
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 4] = True
    packed = {n: x.flatten(0, 1)[None] for n, x in inputs.items()}
    out, _ = case.op(**packed, cu_seqlens=cu_seqlens_from_reset(reset))
    alone, _ = case.op(**{n: x[:1, 4:] for n, x in inputs.items()})
    torch.testing.assert_close(out[:, 4:10], alone, rtol=1e-10, atol=0)


@pytest.mark.slow
@every
def test_long_sequence_float32(case):
    props.assert_agrees(case, props.draw(case, 1500, "cos 0.9 slow"), "chunked", torch.float32)


@matrix
def test_memory_of_backward(case):
    """Kept between forward and backward: the inputs and the chunk states, nothing else."""
    inputs = {n: x.float().requires_grad_() for n, x in props.draw(case, 256).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        case.op(**inputs, backend="chunked", chunk=32)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    extra = sum(x.numel() for x in kept if x.untyped_storage().data_ptr() not in own)
    assert extra <= 2 * 8 * 2 * 5 * 7


def peak_bytes(call):
    """Most bytes alive at once of all that torch allocates during the call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    changes = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        alive += change
        most = max(most, alive)
    del kept
    return most


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["linear_scan", "gla_scalar", "gla_channel", "deltanet", "gated_deltanet", "kda"])
def test_peak_memory_of_forward_and_backward(problem):
    """Outputs, chunk states, gradients and all scratch together: at most twice the inputs plus the chunk states."""
    from kernels.bench.shapes import PROBLEMS

    length = 2048
    inputs = PROBLEMS[problem].draw((4, length, 4, 64), torch.float32, torch.device("cpu"))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    cotangent = torch.ones(PROBLEMS[problem].op(**leaves)[0].shape)

    def call():
        out, final = PROBLEMS[problem].op(**leaves)
        return out, final, torch.autograd.grad(out, list(leaves.values()), cotangent)

    given = sum(x.numel() for x in leaves.values())
    states = 0 if problem == "linear_scan" else 4 * 4 * length // 32 * 64 * 64
    assert peak_bytes(call) <= 2 * 4 * (given + states)
