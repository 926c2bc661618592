"""The CPU product: every op, chunked, against its float64 token loop, in every way it can be called."""

from itertools import pairwise

import kernel_properties as props
import pytest
import torch
from all_cases import ALL, each
from attention_cases import ATTENTION_CASES
from kernel_properties import DISTRIBUTIONS, OFFSETS
from memory_cases import MEMORY_CASES
from rnn_cases import RNN_CASES

every = each(ALL)
fp32_and_fp64 = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def packing(case, cu):
    return {} if cu is None else {"cu_seqlens": torch.tensor(cu, dtype=torch.int32)}


@every
@fp32_and_fp64
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    props.assert_agrees(case, props.draw(case, case.length, kind), "chunked", dtype, chunk=case.chunk)


@every
@pytest.mark.parametrize("length", [1, 2, 15, 17, 33])
def test_any_length(case, length):
    inputs = props.draw(case, length)
    truth = props.truth_of(case, inputs)
    for chunk in (case.chunk, None):
        found = props.tensors_of(case, inputs, backend="chunked", chunk=chunk)
        props.assert_close(case, inputs, found, truth, 1e-10)


@each([case for case in ALL.values() if case.free_chunk])
def test_chunk_length_does_not_matter(case):
    inputs = props.cast(props.draw(case, 100 if case.length > 50 else case.length), torch.float32)
    runs = [props.tensors_of(case, inputs, backend="chunked", chunk=c) for c in (16, 32, 64)]
    for other in runs[1:]:
        props.assert_close(case, inputs, other, runs[0], 1e-6)


@every
@pytest.mark.parametrize("cut", [1, 3, 15, 16, 17])
def test_carry(case, cut):
    inputs = props.draw(case, 32, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="chunked", chunk=case.chunk)
    parts = props.tensors_of(props.carried(case, cut), inputs, backend="chunked", chunk=case.chunk)
    props.assert_close(case, inputs, parts, whole, 1e-10)


@every
def test_carry_of_the_token_loop(case):
    inputs = props.draw(case, 12, "cos 0.5")
    whole = props.tensors_of(case, inputs, backend="reference")
    parts = props.tensors_of(props.carried(case, 5), inputs, backend="reference")
    props.assert_close(case, inputs, parts, whole, 1e-10)


@every
def test_packed_sequences(case):
    inputs = props.draw(case, OFFSETS[-1], "cos 0.5 slow", OFFSETS)
    props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=8, **packing(case, OFFSETS))


@every
def test_packed_is_separate_calls(case):
    """Not through the reference: each sequence alone, by the same backend; and the reference's own packed form."""
    cu = [0, 5, 6, 19]
    inputs = props.draw(case, cu[-1], "cos 0.5", cu)
    for options in ({"backend": "chunked", "chunk": 4}, {"backend": "reference"}):
        out, final = case.op(**inputs, **packing(case, cu), **options)
        for s, (begin, end) in enumerate(pairwise(cu)):
            start = inputs["initial_state"][s : s + 1]
            alone, last = case.op(**props.cut(case, inputs, slice(begin, end)), initial_state=start, **options)
            assert props.error(out[:, begin:end], alone) < 1e-10
            row = final[s : s + 1]
            if case.state_grows:
                row = torch.cat([row[:, : last.shape[1] - 2], row[:, -2:]], dim=1)
            assert props.error(row, last) < 1e-10


@every
def test_packed_gradients_do_not_leak(case):
    cu = [0, 13, 30]
    leaves = {n: x.requires_grad_() for n, x in props.draw(case, 30, cu=cu).items()}
    out, _ = case.op(**leaves, **packing(case, cu), backend="chunked", chunk=8)
    grads = torch.autograd.grad(out[:, 13:].abs().sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        if name not in case.timeless:
            before = grad[:1] if name == "initial_state" else grad[:, :13]
            assert torch.count_nonzero(before) == 0, f"{case.name}: d{name} of sequence 0 is not exactly zero"


@each([case for case in ALL.values() if case.has_reset])
@pytest.mark.parametrize("packed", [False, True])
def test_reset_forgets(case, packed):
    cu = [0, 6, 30] if packed else None
    inputs = props.draw(case, 30, "cos 0.5", cu)
    reset = torch.zeros(1 if packed else 2, 30, dtype=torch.bool)
    reset[0, 7] = reset[0, 20] = reset[-1, 0] = True
    options = {"reset": reset, **packing(case, cu)}
    truth = props.truth_of(case, inputs, **options)
    found = props.tensors_of(case, inputs, backend="chunked", chunk=4, **options)
    props.assert_close(case, inputs, found, truth, 1e-10)
    tail, _ = case.op(
        **{n: x[:1] if case.is_tokens(n) else x for n, x in props.cut(case, inputs, slice(20, 30)).items()}
    )
    assert props.error(found[0][:1, 20:], tail) < 1e-10


@every
def test_nothing_looks_ahead(case):
    """Outputs before a token do not feel it, in every variant and with a memory that is not empty."""
    inputs = props.draw(case, 20)
    plain, _ = case.op(**inputs, backend="chunked", chunk=8)
    moved = {n: torch.cat([x[:, :11], x[:, 11:] * 0.9], 1) if case.is_tokens(n) else x for n, x in inputs.items()}
    other, _ = case.op(**moved, backend="chunked", chunk=8)
    assert torch.equal(plain[:, :11], other[:, :11]) or props.error(other[:, :11], plain[:, :11]) < 1e-14
    assert props.error(other[:, 11:], plain[:, 11:]) > 1e-3


@every
def test_pieces_of_time_do_not_matter(case, monkeypatch):
    """Cut so that a call of the length of a test takes several pieces, each as short as it can be."""
    monkeypatch.setattr("kernels.common.sections.ROWS", 8)
    monkeypatch.setattr("kernels.newton_rnn.adjoint.BACK_SPAN", 1)
    monkeypatch.setattr("kernels.newton_rnn.chunked.SPAN", 1)
    monkeypatch.setattr("kernels.sequential_rnn.chunked.SPAN", 1)
    monkeypatch.setattr("kernels.recurrent_attention.tiles.BAND", 3)
    length = 150 if case.timeless else 90 if case.length > 50 else case.length
    for cu in (None, [0, length // 2, length // 2 + 1, length]):
        inputs = props.draw(case, length, "cos 0.5", cu)
        props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=8, **packing(case, cu))


@every
def test_without_initial_state(case):
    inputs = props.draw(case, 20)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "chunked", torch.float64, chunk=4)


@each([case for case in ALL.values() if case.name != "scan_complex"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("cu", [None, [0, 9, 9, 40]], ids=["dense", "packed"])
def test_half_precision_inputs_are_computed_in_float32(case, dtype, cu):
    """(There are no 16-bit complex numbers.)"""
    given = props.cast(props.draw(case, 40, cu=cu), dtype)
    found = props.tensors_of(case, given, backend="chunked", **packing(case, cu))
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    # what is returned in 16 bits carries one rounding, the cotangents too; the scan's da multiplies the rounded h
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    props.assert_close(case, given, found, props.truth_of(case, given, **packing(case, cu)), tolerance)


@every
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("cu", [None, [0, 4, 4, 14]], ids=["dense", "packed"])
def test_what_stands_beside_the_tokens_may_be_wider(case, backend, cu):
    """Gates, weights and states in float64 are computed like those in float32, and their gradients stay float64."""
    given = props.cast(props.draw(case, 14, cu=cu), torch.float32)
    wide = {
        n: x if n in ("q", "k", "v", "x", "u") else x.to(torch.promote_types(x.dtype, torch.float64))
        for n, x in given.items()
    }
    plain = props.tensors_of(case, given, backend=backend, **packing(case, cu))
    found = props.tensors_of(case, wide, backend=backend, **packing(case, cu))
    assert [x.dtype for x in found] == [*(x.dtype for x in plain[:2]), *(x.dtype for x in wide.values())]
    props.assert_close(case, given, found, plain, 1e-5)


@every
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_autocast_around_a_call_changes_nothing(case, backend):
    """Forward and backward compute in float32 all the same, and return what they promise."""
    inputs = props.cast(props.draw(case, 20), torch.float32)
    plain = props.tensors_of(case, inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = props.tensors_of(case, inputs, backend=backend)
    assert [x.dtype for x in under] == [x.dtype for x in plain]
    # autocast takes products of a backward that is autograd's own: of a token loop, and of the composed memories
    exact = 2 if backend == "reference" or case.name in MEMORY_CASES else len(plain)
    assert all(torch.equal(x, y) for x, y in zip(under[:exact], plain[:exact], strict=True))


@every
def test_non_contiguous_inputs_give_the_same_and_are_not_written(case):
    inputs = props.draw(case, 20)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x for n, x in inputs.items()}
    before = {n: x.clone() for n, x in inputs.items()}
    plain = props.tensors_of(case, inputs, backend="chunked", chunk=4)
    with torch.no_grad():
        case.op(**inputs, backend="chunked", chunk=16)
    assert all(torch.equal(before[n], x) for n, x in inputs.items())
    other = props.tensors_of(case, strided, backend="chunked", chunk=4)
    props.assert_close(case, inputs, other, plain, 1e-12)


@every
def test_nothing_uninitialised_and_bit_equal(case, nan_scratch):
    for cu in (None, OFFSETS):
        inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, cu=cu).items()}
        runs = [props.tensors_of(case, inputs, backend="chunked", chunk=case.chunk, **packing(case, cu)) for _ in "12"]
        assert all(torch.isfinite(x.abs()).all() for x in runs[0])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


EDGES = props.edges_of(ALL.values())


@pytest.mark.parametrize(("case", "edge"), EDGES, ids=[f"{case.name}-{edge}" for case, edge in EDGES])
@fp32_and_fp64
def test_extremes(case, edge, dtype):
    props.assert_agrees(case, props.edge_inputs(case, edge), "chunked", dtype, chunk=16)


@pytest.mark.slow
@every
def test_long_sequence_float32(case):
    # token loops of memories are slow, and that of attention reads all that was before
    length = 250 if case.length < 50 else 600 if case.timeless else 1500
    # what is nonlinear is too chaotic for float32 in the fourth
    kind = "random" if case.is_scan or case.name in {**RNN_CASES, **ATTENTION_CASES} else "cos 0.9 slow"
    props.assert_agrees(case, props.draw(case, length, kind), "chunked", torch.float32)
