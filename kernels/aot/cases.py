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


def _matrix(op: str, dtype: torch.dtype, width: int, gate: str, chunk: int, normalize: bool = False) -> None:
    assert chunk in TRITON_CHUNKS
    from kernels.common.triton_packed import fusing

    x = torch.ones(1, 128, 2, width, dtype=dtype)
    beta = x[..., 0].contiguous()
    g: Tensor | None = {"none": None, "scalar": beta.float(), "channel": x.float()}[gate]
    h0 = torch.ones(1, 2, width, width)
    if op == "delta":
        from kernels.delta_rule import triton as delta

        with fusing(True):
            delta.forward(x, x, x, beta, g, h0, None, 1.5, chunk, normalize, True)
        with fusing(False):
            _, final, states = delta.forward(x, x, x, beta, g, h0, None, 1.5, chunk, normalize, True)
        delta.backward(x, final, x, x, x, beta, g, states, None, 1.5, chunk, normalize)
    else:
        from kernels.gated_linear_attention import triton as gla

        with fusing(True):
            gla.forward(x, x, x, g, h0, None, 1.5, chunk, True)
        with fusing(False):
            _, final, states = gla.forward(x, x, x, g, h0, None, 1.5, chunk, True)
        gla.backward(x, final, x, x, x, g, states, None, 1.5, chunk)


def _ridge(dtype: torch.dtype, width: int, chunk: int) -> None:
    # the rest of ridge memory is the kernels of gated linear attention and the scan
    from kernels.ridge_memory import triton

    x = torch.ones(1, 128, 2, width)
    gate, states = x[..., 0].contiguous(), torch.ones(128 // chunk, 2, width, width)
    triton.solve(x, x, gate, gate, gate, states, None, 0.02, 1e-6, 30, chunk, dtype == torch.bfloat16)


def _memory(width: int) -> None:
    from kernels.neural_memory.triton_layer import _backward, _forward

    # the first layer of a memory of two, a whole piece of its chunk
    h, delta, w = torch.ones(1, 2, 64, width), torch.ones(1, 2, 64, 2 * width), torch.ones(1, 2, width, 2 * width)
    into, step, slowed = torch.ones(1, 2, 64, 1), torch.ones(1, 2, 64, 64), torch.ones(1, 2, 1, 1)
    inputs = [h, h, delta, w, w, into, step, into, slowed, into]
    _backward(_forward(inputs), inputs)


def _newton(cell: str, dtype: torch.dtype, *, is_block: bool) -> None:
    from kernels.newton_rnn import BLOCK_TANGENTS, MOST_BLOCK, TRITON_ROWS, triton

    units = (4, MOST_BLOCK) if is_block else (64,)
    x, r = torch.ones(1, 2048, 3, *units, dtype=dtype), torch.ones(3, *units, *units[1:])
    parts = 2 if cell == "lstm" else 1
    h0, peephole = torch.ones(1, parts, *units), torch.ones(2, *units) if cell == "lstm" else None
    how = (None, None, cell, 32, 32 * (BLOCK_TANGENTS // parts if is_block else TRITON_ROWS))
    h, c, final, _, _ = triton.forward(x, r, peephole, h0, *how, 1e-6, 8)
    triton.backward(h, final, x, r, peephole, h0, h, c, *how)


def _sequential(cell: str, dtype: torch.dtype, width: int) -> None:
    from kernels.sequential_rnn import triton
    from kernels.sequential_rnn.reference import GATES, PARTS

    x = torch.ones(16, 64, GATES[cell], 2, width, dtype=dtype)
    r, s0 = torch.ones(GATES[cell], 2, width, width), torch.ones(16, PARTS[cell], 2, width)
    h, final, kept = triton.forward(x, r, None, s0, None, None, cell)
    triton.backward(h, final, x, r, None, s0, kept, None, None, cell)


def _m2rnn(dtype: torch.dtype, keys: int, values: int) -> None:
    from kernels.sequential_rnn import triton_m2rnn as triton

    q, v = torch.ones(2, 64, 2, keys, dtype=dtype), torch.ones(2, 64, 2, values, dtype=dtype)
    f, w, s0 = torch.ones(2, 64, 2), torch.ones(2, values, values), torch.ones(2, 2, keys, values)
    o, final, kept = triton.forward(q, q, v, f, w, s0, None, None, 32, True)
    triton.backward(o, final, q, q, v, f, w, kept, None, None, 32, 0.0)


def cases(smoke: bool = False) -> dict[str, Callable[[], Any]]:
    """Name to call; `smoke` is the part that is compiled in every test run."""
    found: dict[str, Callable[[], Any]] = {"scan fp32": partial(_scan, torch.float32)}
    for cell in ("gru", "lstm"):
        found[f"newton {cell} fp32"] = partial(_newton, cell, torch.float32, is_block=False)
        found[f"newton block {cell} fp32"] = partial(_newton, cell, torch.float32, is_block=True)
    widths = [64] if smoke else [64, 128]
    for width in widths:
        found[f"memory layer fp32 K={width} V={2 * width} T=64"] = partial(_memory, width)
    dtypes = [torch.bfloat16] if smoke else [torch.bfloat16, torch.float32]
    for width, dtype in product(widths, dtypes):
        for op, gate in product(("gla", "delta"), ("scalar",) if smoke else ("scalar", "channel")):
            chunk = matrix_chunk(dtype, per_channel=gate == "channel", wide=op == "delta")
            name = f"{op} {gate} {str(dtype).removeprefix('torch.')} K=V={width} C={chunk}"
            found[name] = partial(_matrix, op, dtype, width, gate, chunk)
            if op == "delta" and gate == "scalar" and not smoke:
                normalized = partial(_matrix, op, dtype, width, gate, chunk, normalize=True)
                found[name.replace("scalar", "scalar normalized")] = normalized
        short = str(dtype).removeprefix("torch.")
        # float32 matrices of 128 x 128 do not fit next to the state
        for cell in ("lstm",) if smoke else ("gru", "lstm", "slstm") if (width, short) != (128, "float32") else ():
            found[f"sequential {cell} {short} D={width}"] = partial(_sequential, cell, dtype, width)
        if width == 64:
            for values in (16,) if smoke else (16, 64):
                found[f"m2rnn {short} K=64 V={values}"] = partial(_m2rnn, dtype, 64, values)
        chunk = 16 if width > 64 and dtype == torch.float32 else 32
        found[f"ridge {str(dtype).removeprefix('torch.')} K={width} C={chunk}"] = partial(_ridge, dtype, width, chunk)
    return found
