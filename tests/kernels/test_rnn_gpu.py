"""On a card: the nonlinear recurrences by the real compiler. `python -m kernels.check_gpu` covers every row."""

import os

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS, OFFSETS
from rnn_cases import ON_TRITON, RNN_CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA card"
    ),
]
every = pytest.mark.parametrize("case", [RNN_CASES[n] for n in ON_TRITON], ids=ON_TRITON)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def on_card(inputs):
    return {n: x.cuda() for n, x in inputs.items()}


@every
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    given = props.cast(props.draw(case, 150, kind), dtype)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given), backend="triton")]
    props.assert_close(case, given, found, props.truth_of(case, given), props.TOLERANCE["triton", dtype])


@every
def test_packed_sequences(case):
    given = props.cast(props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS), torch.float32)
    cu = torch.tensor(OFFSETS)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given), cu_seqlens=cu.cuda(), backend="triton")]
    props.assert_close(case, given, found, props.truth_of(case, given, cu_seqlens=cu), 1e-5)


@every
def test_bit_equal_runs(case):
    given = on_card(props.cast(props.draw(case, 300), torch.float32))
    first, second = (props.tensors_of(case, given, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every
def test_long_sequence(case):
    """4096 tokens, blocks of time after blocks of time; the truth is chunked torch in float64 on the CPU."""
    given = props.cast(props.draw(case, 4096, "random"), torch.float32)
    truth = props.tensors_of(case, props.cast(given, torch.float64), backend="chunked")
    found = [x.cpu() for x in props.tensors_of(case, on_card(given), backend="triton")]
    props.assert_close(case, given, found, truth, 1e-5)


def test_offsets_beyond_31_bits():
    from kernels.newton_rnn import newton_rnn

    length, units = 2**19 + 3, 2**11
    x = torch.zeros(1, length, 3, units, device="cuda", dtype=torch.bfloat16)
    x[:, :, 2] = 100
    with torch.no_grad():
        h, last = newton_rnn(x, torch.zeros(3, units, device="cuda"))
    torch.testing.assert_close(last, torch.ones_like(last), rtol=1e-2, atol=0)
    torch.testing.assert_close(h[0, -1].float(), last[0], rtol=1e-2, atol=0)
