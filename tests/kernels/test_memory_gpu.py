"""The memory ops on a card: the real compiler, all dtypes. `python -m kernels.check_gpu` covers every row."""

import os

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS, OFFSETS
from memory_cases import MEMORY_CASES, ON_TRITON

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA card"
    ),
]
every = pytest.mark.parametrize("case", MEMORY_CASES.values(), ids=MEMORY_CASES.keys())
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def on_card(inputs):
    return {n: x.cuda() for n, x in inputs.items()}


@every
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_agrees_with_token_loop(case, dtype, kind):
    if "routed" in case.name and dtype != torch.float32:
        pytest.skip("scores that tie in 16 bits choose another memory")
    given = props.cast(props.draw(case, 60, kind), dtype)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given))]
    props.assert_close(case, given, found, props.truth_of(case, given), props.TOLERANCE["triton", dtype])


@every
def test_packed_sequences(case):
    given = props.cast(props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS), torch.float32)
    cu = torch.tensor(OFFSETS)
    found = [x.cpu() for x in props.tensors_of(case, on_card(given), cu_seqlens=cu.cuda())]
    props.assert_close(case, given, found, props.truth_of(case, given, cu_seqlens=cu), 1e-5)


@pytest.mark.parametrize("name", ON_TRITON)
def test_bit_equal_runs(name):
    case = MEMORY_CASES[name]
    given = on_card(props.cast(props.draw(case, 100), torch.float32))
    first, second = props.tensors_of(case, given, backend="triton"), props.tensors_of(case, given, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
