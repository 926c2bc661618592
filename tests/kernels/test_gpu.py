"""On a card: the real compiler, all dtypes, offsets beyond 2**31. `python -m kernels.check_gpu` covers every row."""

import os

import kernel_properties as props
import pytest
import torch
from kernel_properties import CASES, DISTRIBUTIONS, OFFSETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA card"
    ),
]
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def on_card(inputs):
    return {n: x.cuda() for n, x in inputs.items()}


@every
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    if case.name == "scan_complex" and dtype != torch.float32:
        pytest.skip("no 16-bit complex numbers")
    given = props.cast(props.draw(case, 150, kind), dtype)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given))]
    tolerance = props.TOLERANCE["triton", dtype]
    props.assert_close(case, given, found, props.truth_of(case, given), tolerance)


@every
def test_packed_sequences(case):
    given = props.cast(props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS), torch.float32)
    cu = torch.tensor(OFFSETS)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given), cu_seqlens=cu.cuda())]
    props.assert_close(case, given, found, props.truth_of(case, given, cu_seqlens=cu), 1e-5)


@every
def test_bit_equal_runs(case):
    given = on_card(props.cast(props.draw(case, 300), torch.float32))
    first, second = props.tensors_of(case, given), props.tensors_of(case, given)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every
def test_long_sequence_against_chunked(case):
    """65,536 tokens: segments of the scan, many chunks; the truth is chunked torch in float64 on the card."""
    given = on_card(props.cast(props.draw(case, 65536, "cos 0.5"), torch.float32))
    wide = {n: x.to(torch.complex128 if x.is_complex() else torch.float64) for n, x in given.items()}
    truth = props.tensors_of(case, wide, backend="chunked")
    props.assert_close(case, given, props.tensors_of(case, given), truth, 1e-5)


def test_offsets_beyond_31_bits():
    from kernels.linear_scan import linear_scan

    length, channels = 2**20 + 3, 2**11
    a = torch.full((1, length, channels), 0.5, device="cuda", dtype=torch.bfloat16)
    h, last = linear_scan(a, a)
    torch.testing.assert_close(last, torch.ones_like(last), rtol=1e-2, atol=0)
    torch.testing.assert_close(h[0, -1].float(), last[0], rtol=1e-2, atol=0)
