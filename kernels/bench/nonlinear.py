"""The problems of nonlinear recurrences: x holds the gate inputs, r (or w) the recurrent weights."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.bench.problem import Inputs, Problem, Shape
from kernels.newton_rnn import MOST_BLOCK, newton_rnn
from kernels.sequential_rnn import m2rnn, sequential_rnn

M2RNN_VALUES = 16


def _cells(gates: int, *, is_diagonal: bool) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        batch, length, heads, width = shape
        weights = (gates, heads, width) if is_diagonal else (gates, heads, width, width)
        r = 2 * torch.rand(weights, device=device) - 1
        x = torch.randn(batch, length, gates, heads, width, device=device)
        return {"x": x.to(dtype), "r": (r if is_diagonal else r / width**0.5).to(dtype)}

    return draw


def _blocks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """As many units in narrower heads: Newton takes a matrix per head of up to 16."""
    batch, length, heads, width = shape
    own = min(width, MOST_BLOCK)
    return _cells(3, is_diagonal=False)((batch, length, heads * (width // own), own), dtype, device)


def _draw_m2rnn(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    q, k = (torch.randn(shape, device=device) / shape[3] ** 0.5 for _ in range(2))
    v = torch.randn(*shape[:3], M2RNN_VALUES, device=device)
    f = torch.sigmoid(torch.randn(shape[:3], device=device))
    w = torch.randn(shape[2], M2RNN_VALUES, M2RNN_VALUES, device=device) / M2RNN_VALUES**0.5
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "f": f, "w": w.to(dtype)}


def _cut_cells(inputs: Inputs) -> Inputs:
    return {"x": inputs["x"][:1, :130, :, :2], "r": inputs["r"][:, :2]}


def _cut_m2rnn(inputs: Inputs) -> Inputs:
    return {name: x[:2] if name == "w" else x[:1, :130, :2] for name, x in inputs.items()}


def _newton_flops(width: int, chunk: int) -> tuple[int, int]:
    return 135 * width, 195 * width


def _block_flops(width: int, chunk: int) -> tuple[int, int]:
    # three walks of three products, one with the tangents of every unit; the backward pulls as many, once
    own = min(width, MOST_BLOCK)
    return 6 * width * own * (3 + own), 12 * width * own * (3 + own)


def _cell_flops(gates: int) -> Callable[[int, int], tuple[int, int]]:
    # backward: the recurrent products again, the adjoint's, the weights'
    return lambda width, chunk: (2 * gates * width**2, 8 * gates * width**2)


def _m2rnn_flops(width: int, chunk: int) -> tuple[int, int]:
    forward = width * (2 * M2RNN_VALUES**2 + 6 * M2RNN_VALUES)
    return forward, 4 * forward


_DIAGONAL = _cells(3, is_diagonal=True)
NONLINEAR = (
    Problem("newton_gru", partial(newton_rnn, cell="gru"), _DIAGONAL, _newton_flops, _cut_cells),
    Problem("newton_lstm", partial(newton_rnn, cell="lstm"), _DIAGONAL, _newton_flops, _cut_cells),
    *(
        Problem(f"newton_block_{cell}", partial(newton_rnn, cell=cell), _blocks, _block_flops, _cut_cells)
        for cell in ("gru", "lstm")
    ),
    *(
        Problem(
            f"sequential_{cell}",
            partial(sequential_rnn, cell=cell),
            _cells(gates, is_diagonal=False),
            _cell_flops(gates),
            _cut_cells,
        )
        for cell, gates in (("gru", 3), ("lstm", 4), ("slstm", 4))
    ),
    Problem("m2rnn", m2rnn, _draw_m2rnn, _m2rnn_flops, _cut_m2rnn),
)
