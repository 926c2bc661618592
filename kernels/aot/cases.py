"""The calls whose kernels are compiled ahead of time: every op, the dtypes and widths people use."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels.common.dispatch import TRITON_CHUNKS, matrix_chunk


def _scan(dtype: torch.dtype) -> None:
    from kernels.linear_scan import triton

    a = torch.ones(1, 2048, 64, dtype=dtype)
    h, final = triton.forward(a, a, a[:, 0], None, 32)
    triton.backward(a, final, a, h, a[:, 0], None, 32)


def _matrix(op: str, dtype: torch.dtype, width: int, gate: str, chunk: int) -> None:
    assert chunk in TRITON_CHUNKS
    x = torch.ones(1, 128, 2, width, dtype=dtype)
    beta = x[..., 0].contiguous()
    g: Tensor | None = {"none": None, "scalar": beta.float(), "channel": x.float()}[gate]
    h0 = torch.ones(1, 2, width, width)
    if op == "delta":
        from kernels.delta_rule import triton as delta

        _, final, states = delta.forward(x, x, x, beta, g, h0, None, 1.5, chunk, True)
        delta.backward(x, final, x, x, x, beta, g, states, None, 1.5, chunk)
    else:
        from kernels.gated_linear_attention import triton as gla

        _, final, states = gla.forward(x, x, x, g, h0, None, 1.5, chunk, True)
        gla.backward(x, final, x, x, x, g, states, None, 1.5, chunk)


def cases(smoke: bool = False) -> dict[str, Callable[[], Any]]:
    """Name to call; `smoke` is the part that is compiled in every test run."""
    found: dict[str, Callable[[], Any]] = {"scan fp32": partial(_scan, torch.float32)}
    widths = [64] if smoke else [64, 128]
    dtypes = [torch.bfloat16] if smoke else [torch.bfloat16, torch.float32]
    for width, dtype in product(widths, dtypes):
        for op, gate in product(("gla", "delta"), ("scalar",) if smoke else ("scalar", "channel")):
            chunk = matrix_chunk(dtype, per_channel=gate == "channel", wide=op == "delta")
            name = f"{op} {gate} {str(dtype).removeprefix('torch.')} K=V={width} C={chunk}"
            found[name] = partial(_matrix, op, dtype, width, gate, chunk)
    return found
