"""GRU, LSTM and sLSTM with a matrix per head on any device: what is not sequential is taken out of the loop.

Forward: the loop holds one batched product and the gates. Backward: the gates of a piece of time are computed again at
once (one product from the kept states), the loop over the adjoint holds one product and a few multiplications, and the
weight gradient is one product over all tokens after it.

Legend: S sequences, R rows (tokens in the order of `Order`), H heads, G gates, P parts of the state, D width; inputs of
the loop are [H, rows, G * D], states [P, H, rows, D].
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.sequential_rnn.chunked_cells import CELLS, Cell, Planes
from kernels.sequential_rnn.order import Order

# elements of the gates of one piece of time: the dozen tensors of the backward stay near the processor
SPAN = 2**19


def _heads(rows_RGHD: Tensor, dtype: torch.dtype) -> Tensor:
    """[r, G, H, D] (or [r, H, D]) as a new [H, r, G * D]."""
    moved = rows_RGHD.movedim(-2, 0)
    return moved.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(2)


def _span(order: Order, gates: int, units: int) -> int:
    return max(16, SPAN // max(1, order.counts[0] * gates * units))


def _cell(name: str, r_GHDD: Tensor, bias_GHD: Tensor | None, dtype: torch.dtype) -> Cell:
    bias = r_GHDD.new_zeros(r_GHDD.shape[:3]) if bias_GHD is None else bias_GHD
    return CELLS[name](r_GHDD.to(dtype), bias.to(dtype))


def forward(
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_SPHD: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h [B, T, H, D], the last state [S, P, H, D] and all states [P, R, H * D] as the backward wants them."""
    dtype = state_dtype(x_BTGHD.dtype)
    batch, length, gates, heads, width = x_BTGHD.shape
    cell = _cell(cell_name, r_GHDD, bias_GHD, dtype)
    order = Order(batch, length, reset, cu_seqlens)
    last_PHSD = _start(s0_SPHD, x_BTGHD, order, cell.parts)
    kept = x_BTGHD.new_empty(cell.parts, batch * length, heads * width, dtype=dtype)
    states_PHRD = kept.view(cell.parts, heads, batch * length, width)
    h_BTHD = x_BTGHD.new_empty(batch, length, heads, width, dtype=dtype)
    state, span = last_PHSD, _span(order, gates, heads * width)
    for begin in range(0, order.steps, span):
        end = min(begin + span, order.steps)
        x = cell.inputs(_heads(order.rows(x_BTGHD, begin, end), dtype))
        states = states_PHRD[:, :, order.begins[begin] : order.begins[end]]
        counts = order.counts[begin:end]
        steps = zip(range(begin, end), counts, x.split(counts, 1), states.split(counts, 2), strict=True)
        for t, count, x_t, out in steps:
            if count < state.shape[2]:
                # the long sequences come first: what has ended stays in the rows behind
                last_PHSD[:, :, count : state.shape[2]] = state[:, :, count:]
                state = state[:, :, :count]
            if t in order.forgets:
                state = state.index_fill(2, order.forgets[t], 0)
            if t == 0 or t in order.forgets:
                state = cell.opened(state)
            cell.step(x_t, state, out)
            state = out
        order.put(h_BTHD, states[-1].transpose(0, 1), begin, end)
    last_PHSD[:, :, : state.shape[2]] = state
    return h_BTHD, order.unsort(last_PHSD.permute(2, 0, 1, 3).contiguous()), kept


def _start(s0_SPHD: Tensor | None, x: Tensor, order: Order, parts: int) -> Tensor:
    """Initial states [P, H, S, D] of the sorted sequences, in memory of their own."""
    dtype = state_dtype(x.dtype)
    if s0_SPHD is None:
        return x.new_zeros(parts, x.shape[3], len(order.sequences), x.shape[4], dtype=dtype)
    return order.sort(s0_SPHD.to(dtype)).permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)


def backward(
    dh_BTHD: Tensor,
    dfinal_SPHD: Tensor,
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_SPHD: Tensor | None,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, r, bias [G, H, D] and of the initial states [S, P, H, D]."""
    dtype = kept.dtype
    batch, length, gates, heads, width = x_BTGHD.shape
    cell = _cell(cell_name, r_GHDD, bias_GHD, dtype)
    order = Order(batch, length, reset, cu_seqlens)
    first_PHSD = _start(s0_SPHD, x_BTGHD, order, cell.parts)
    states_PHRD = kept.view(cell.parts, heads, batch * length, width)
    adjoint_PHSD = _start(dfinal_SPHD, x_BTGHD, order, cell.parts)
    dx_BTGHD = x_BTGHD.new_empty(x_BTGHD.shape)
    dr, dbias = torch.zeros_like(cell.r), x_BTGHD.new_zeros(heads, gates * width, dtype=dtype)
    span = _span(order, gates, heads * width)
    for begin in range((order.steps - 1) // span * span, -1, -span):
        end = min(begin + span, order.steps)
        base, top = order.begins[begin], order.begins[end]
        x = cell.inputs(_heads(order.rows(x_BTGHD, begin, end), dtype))
        dh = _heads(order.rows(dh_BTHD, begin, end), dtype)
        # a sequence that has ended has no row here, and needs none
        start = states_PHRD[:, :, order.begins[begin - 1] : base] if begin else first_PHSD
        before = order.before(states_PHRD.flatten(0, 1), start.flatten(0, 1), begin, end)
        before = before.unflatten(0, (cell.parts, heads))
        planes = cell.planes(x, before, states_PHRD[:, :, base:top])
        _loop(cell, order, planes, dh, adjoint_PHSD, begin, end)
        g = planes["g"]
        # the weight gradient is one product over all tokens of the piece
        dr.baddbmm_(before[-1].mT, g)
        dbias += g.sum(1)
        order.put(dx_BTGHD, cell.tokens(planes).unflatten(-1, (gates, width)).movedim(0, 2), begin, end)
    dr_GHDD = dr.unflatten(2, (gates, width)).permute(2, 0, 1, 3).to(r_GHDD.dtype).contiguous()
    like = r_GHDD if bias_GHD is None else bias_GHD
    dbias_GHD = dbias.unflatten(1, (gates, width)).transpose(0, 1).to(like.dtype).contiguous()
    return dx_BTGHD, dr_GHDD, dbias_GHD, order.unsort(adjoint_PHSD.permute(2, 0, 1, 3).contiguous())


def _loop(cell: Cell, order: Order, planes: Planes, dh: Tensor, adjoint_PHSD: Tensor, begin: int, end: int) -> None:
    """The adjoint through steps end .. begin, in place; rows of sequences that have ended stay as they are."""
    counts = order.counts[begin:end]
    of_step = zip(*(plane.split(counts, -2) for plane in planes.values()), strict=True)
    steps = list(zip(range(begin, end), counts, dh.split(counts, 1), of_step, strict=True))
    for t, count, dh_t, rows in reversed(steps):
        adjoint = adjoint_PHSD[:, :, :count]
        adjoint[-1] += dh_t
        cell.back(dict(zip(planes, rows, strict=True)), adjoint)
        if t in order.forgets:
            adjoint.index_fill_(2, order.forgets[t], 0)
