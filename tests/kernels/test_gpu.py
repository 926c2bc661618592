"""On a card: the real compiler, all ops and dtypes, offsets beyond 2**31. `kernels.check_gpu` covers every row."""

import os

import kernel_properties as props
import pytest
import torch
from all_cases import ALL, each
from kernel_properties import DISTRIBUTIONS, OFFSETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA card"
    ),
]
every = each(ALL)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def on_card(inputs):
    return {n: x.cuda() for n, x in inputs.items()}


@every
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    if case.name == "scan_complex" and dtype != torch.float32:
        pytest.skip("no 16-bit complex numbers")
    if "routed" in case.name and dtype != torch.float32:
        pytest.skip("scores that tie in 16 bits choose another memory")
    given = props.cast(props.draw(case, 150 if case.length > 50 else 60, kind), dtype)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given))]
    props.assert_close(case, given, found, props.truth_of(case, given), props.TOLERANCE["triton", dtype])


@every
def test_packed_sequences(case):
    given = props.cast(props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS), torch.float32)
    cu = torch.tensor(OFFSETS)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given), cu_seqlens=cu.cuda())]
    props.assert_close(case, given, found, props.truth_of(case, given, cu_seqlens=cu), 1e-5)


@every
def test_bit_equal_runs(case):
    given = on_card(props.cast(props.draw(case, 300 if case.length > 50 else 100), torch.float32))
    backend = "triton" if case.has_triton else "chunked"
    first, second = (props.tensors_of(case, given, backend=backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every
def test_long_sequence_against_chunked(case):
    """Segments of the scan, blocks of time, many chunks; the truth is chunked torch in float64."""
    if case.length < 50:
        pytest.skip("a composition of ops that are tested at this length")
    # nonlinear recurrences walk token by token in the truth: on a CPU
    length, where = (4096, "cpu") if case.timeless and case.name != "retention" else (65536, "cuda")
    given = props.cast(props.draw(case, length, "random"), torch.float32)
    truth = props.tensors_of(
        case, {n: x.to(where) for n, x in props.cast(given, torch.float64).items()}, backend="chunked"
    )
    found = props.tensors_of(case, on_card(given), backend="triton")
    props.assert_close(case, given, [x.cpu() for x in found], [x.cpu() for x in truth], 1e-5)


def test_offsets_beyond_31_bits():
    from kernels.linear_scan import linear_scan

    length, channels = 2**20 + 3, 2**11
    a = torch.full((1, length, channels), 0.5, device="cuda", dtype=torch.bfloat16)
    h, last = linear_scan(a, a)
    torch.testing.assert_close(last, torch.ones_like(last), rtol=1e-2, atol=0)
    torch.testing.assert_close(h[0, -1].float(), last[0], rtol=1e-2, atol=0)


def test_offsets_beyond_31_bits_of_newton():
    from kernels.newton_rnn import newton_rnn

    length, units = 2**19 + 3, 2**11
    x = torch.zeros(1, length, 3, units, device="cuda", dtype=torch.bfloat16)
    x[:, :, 2] = 100
    with torch.no_grad():
        h, last = newton_rnn(x, torch.zeros(3, units, device="cuda"))
    torch.testing.assert_close(last, torch.ones_like(last), rtol=1e-2, atol=0)
    torch.testing.assert_close(h[0, -1].float(), last[0], rtol=1e-2, atol=0)
