"""The Triton kernels in the interpreter: float32 and float16 (bfloat16 there is silently wrong and never run).

The interpreter sees neither data races nor the compiler; it proves the arithmetic, the masks and the offsets.
"""

import os

import kernel_properties as props
import pytest
import torch
from kernel_properties import CASES, DISTRIBUTIONS, OFFSETS

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
MATRIX = [case for case in CASES.values() if case.is_matrix]
matrix = pytest.mark.parametrize("case", MATRIX, ids=[case.name for case in MATRIX])


def chunk_of(case):
    return {"chunk": 16} if case.is_matrix else {}


@every
def test_agrees_with_token_loop(case, nan_scratch):
    props.assert_agrees(case, props.draw(case, 21, "cos 0.5 slow"), "triton", torch.float32, **chunk_of(case))


@every
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.slow
def test_all_key_distributions(case, kind):
    props.assert_agrees(case, props.draw(case, 33, kind), "triton", torch.float32, **chunk_of(case))


@matrix
@pytest.mark.slow
def test_float16(case):
    props.assert_agrees(case, props.draw(case, 40, "cos 0.5"), "triton", torch.float16, chunk=16)


@every
@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16, 17])
def test_any_length(case, length):
    props.assert_agrees(case, props.draw(case, length), "triton", torch.float32, **chunk_of(case))


@every
def test_packed_sequences(case, nan_scratch):
    if case.name not in ("scan_real", "gla_scalar", "gated_deltanet"):
        pytest.skip("its slow twin runs it")
    check_packed(case)


@every
@pytest.mark.slow
def test_packed_sequences_everywhere(case, nan_scratch):
    check_packed(case)


def check_packed(case):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS).items()}
    props.assert_agrees(case, inputs, "triton", torch.float32, cu_seqlens=cu, **chunk_of(case))


@every
@pytest.mark.slow
@pytest.mark.parametrize("cut", [17])
def test_carry(case, cut):
    inputs = props.cast(props.draw(case, 33, "cos 0.5"), torch.float32)
    whole = props.tensors_of(case, inputs, backend="triton", **chunk_of(case))
    parts = props.tensors_of(props.carried(case, cut), inputs, backend="triton", **chunk_of(case))
    props.assert_close(case, inputs, parts, whole, 1e-5)


@matrix
@pytest.mark.slow
@pytest.mark.parametrize("chunk", [32, 64])
def test_other_chunks(case, chunk):
    props.assert_agrees(case, props.draw(case, 70, "cos 0.5"), "triton", torch.float32, chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(3, 33), (17, 20), (40, 70)])
@pytest.mark.parametrize("name", ["gla_scalar", "gla_channel", "gated_deltanet", "kda"])
def test_tiles_of_both_widths(name, widths):
    case = CASES[name]
    inputs = props.draw(case, 20)
    k, v = widths
    gen = torch.Generator().manual_seed(3)
    for key in ("q", "k"):
        inputs[key] = torch.nn.functional.normalize(torch.randn(2, 20, 2, k, generator=gen), dim=-1)
    inputs["v"] = torch.randn(2, 20, 2, v, generator=gen)
    inputs["initial_state"] = torch.randn(2, 2, k, v, generator=gen)
    if inputs["g"].dim() == 4:
        inputs["g"] = -torch.rand(2, 20, 2, k, generator=gen)
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan_real", "scan_complex"])
@pytest.mark.parametrize("segment", [16, 20])
def test_scan_in_segments(name, segment, nan_scratch, monkeypatch):
    from kernels.linear_scan import triton

    monkeypatch.setattr(triton, "BUSY", 0.25)
    monkeypatch.setattr(triton, "SEGMENT_LEAST", segment)
    case = CASES[name]
    for cu in (None, [0, 3, 3, 44, 50]):
        packed = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
        props.assert_agrees(case, props.draw(case, 50, cu=cu), "triton", torch.float32, **packed)


@pytest.mark.parametrize("name", ["gla_scalar", "gated_deltanet"])
def test_fused_walk(name, nan_scratch):
    check_fused(CASES[name])


@pytest.mark.slow
@matrix
def test_fused_walk_everywhere(case, nan_scratch):
    if props.draw(case, 2).get("g", torch.zeros(1)).dim() == 4:
        pytest.skip("with a decay per channel it would spill and is never fused")
    check_fused(case)


def check_fused(case):
    """One launch instead of two or three, the same numbers; packed, dense, and with nothing kept for a backward."""
    from kernels.common import triton_chunks
    from kernels.common.triton import recording

    for cu in (None, OFFSETS):
        packed = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
        inputs = {n: props.in_halo(x) for n, x in props.draw(case, 50, "cos 0.5 slow", cu).items()}
        with triton_chunks.fusing(True):
            props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16, **packed)
    given = props.cast(props.draw(case, 21), torch.float32)
    with triton_chunks.fusing(True), torch.no_grad():
        fused = case.op(**given, backend="triton", chunk=16)
        with recording() as launched:
            case.op(**given, backend="triton", chunk=16)
    assert len({one.kernel.name for one in launched}) == 1
    with triton_chunks.fusing(False), torch.no_grad():
        split = case.op(**given, backend="triton", chunk=16)
    assert max(props.error(x, y) for x, y in zip(fused, split, strict=True)) < 1e-6


def test_fused_walk_is_chosen_where_it_fills_the_card(monkeypatch):
    from kernels.common import triton_chunks
    from kernels.common.triton import recording

    def kernels_of(heads, width):
        x = torch.zeros(1, 16, heads, width)
        with recording() as launched, torch.no_grad():
            CASES["linear_attention"].op(x, x, x, backend="triton", chunk=16)
        return {one.kernel.name for one in launched}

    monkeypatch.setattr(triton_chunks, "PROCESSORS", 8)
    assert kernels_of(8, 16) == {"walk_outputs"}
    assert kernels_of(7, 16) == {"walk_states", "chunk_outputs"}
    # two tiles of V are two programs, and a state too wide for the registers is never fused
    assert kernels_of(4, 64) == {"walk_outputs"}
    assert kernels_of(8, 160) == {"walk_states", "chunk_outputs"}


def test_bfloat16_is_upcast_on_the_host():
    case = CASES["gla_scalar"]
    given = props.cast(props.draw(case, 20), torch.bfloat16)
    found = props.tensors_of(case, given, backend="triton", chunk=16)
    assert found[0].dtype == torch.bfloat16
    props.assert_close(case, given, found, props.truth_of(case, given), 5e-3)


@pytest.mark.parametrize("name", ["scan_real", "gla_scalar", "gated_deltanet"])
def test_bit_equal_runs(name):
    case = CASES[name]
    inputs = props.cast(props.draw(case, 17), torch.float32)
    first, second = (props.tensors_of(case, inputs, backend="triton", **chunk_of(case)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("edge", ["no decay", "wiped", "some wiped", "zero key", "repeated key", "large value", "beta"])
@matrix
def test_extremes(case, edge):
    inputs = props.edge_inputs(case, edge)
    if inputs is None:
        pytest.skip("the op has no such input")
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)
