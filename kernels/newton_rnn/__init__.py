"""Nonlinear RNNs solved in parallel over time (ParaRNN): GRU and coupled-gate LSTM, diagonal or a matrix per head."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.common.checks import (
    require_alike,
    require_cu_seqlens,
    require_numbers,
    require_reset,
    require_shape,
    state_dtype,
)
from kernels.common.dispatch import Decision, choose, explained_by, too_many
from kernels.newton_rnn import chunked
from kernels.newton_rnn.op import solved
from kernels.newton_rnn.reference import newton_rnn_reference

__all__ = ["NewtonReport", "newton_rnn", "newton_rnn_with_report"]

OP = "newton_rnn"
CELLS = ("gru", "lstm")
GATES = 3
# the derivative of a chunk by its start is D x D per head, and walked like D states
MOST_BLOCK = 16
# chunks that one Triton program walks side by side; with a matrix per head each takes D tangents per part of the state
TRITON_ROWS, BLOCK_TANGENTS = 32, 16


class NewtonReport(NamedTuple):
    """What Newton did, one entry per block of time: of the whole batch (chunked), of each sequence in turn (Triton).

    iterations: corrections made, int32; -1 where none was tried (short block, wide batch, max_iterations = 0).
    residual: largest gap between a chunk's end and the next one's start, relative to the states, at the last check.
    sequential: True where the block was walked token by token after all.
    tolerance: the residual that counts as solved.
    """

    iterations: Tensor
    residual: Tensor
    sequential: Tensor
    tolerance: float


def _plan(
    x: Tensor,
    r: Tensor,
    *,
    cell: str = "gru",
    peephole: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 8,
    backend: str = "auto",
) -> Decision:
    if cell not in CELLS:
        raise ValueError(f"{OP}: unknown cell {cell!r}; use one of {', '.join(CELLS)}")
    require_alike(OP, {"x": x, "r": r, "peephole": peephole, "initial_state": initial_state})
    if x.dim() < 4 or min(x.shape) < 1 or x.shape[2] != GATES:
        raise ValueError(f"{OP}: x must be [B, T, {GATES}, ...] with no empty size, got {list(x.shape)}")
    units = tuple(x.shape[3:])
    is_block = r.dim() == x.dim() - 1
    if is_block and x.dim() != 5:
        raise ValueError(f"{OP}: a matrix per head needs x [B, T, {GATES}, H, D], got {list(x.shape)}")
    if is_block:
        require_shape(OP, "r", r, (GATES, *units, units[-1]), "[G, H, D, D]")
    else:
        require_shape(OP, "r", r, (GATES, *units), "[G, ...] (diagonal) or [G, H, D, D]")
    if peephole is not None and cell != "lstm":
        raise ValueError(f"{OP}: peephole is for cell 'lstm', got cell {cell!r}")
    if peephole is not None:
        require_shape(OP, "peephole", peephole, (2, *units), "[2, ...]")
    require_cu_seqlens(OP, cu_seqlens, x)
    if initial_state is not None:
        require_shape(OP, "initial_state", initial_state, _state_shape(x, cell, cu_seqlens), _legend(cell))
    require_reset(OP, reset, x)
    if not isinstance(max_iterations, int):
        raise ValueError(f"{OP}: max_iterations must be a whole number, got {max_iterations!r}")
    if max_iterations < 0:
        raise ValueError(f"{OP}: max_iterations must be at least 0, got {max_iterations}")
    require_numbers(OP, above_zero=True, tolerance=tolerance)
    refusal = too_many("heads", units[0], 1) if is_block else too_many("units", x.shape[3:].numel(), 16)
    decision = choose(OP, backend, x, chunk=chunk, refusal=refusal, triton_chunk=32)
    if decision.backend == "chunked" and chunk is None:
        decision = replace(decision, chunk=chunked.CHUNK)
    if is_block and decision.backend != "reference" and units[-1] > MOST_BLOCK:
        raise ValueError(
            f"{OP}: a matrix per head is solved for D <= {MOST_BLOCK}, got {units[-1]}; use sequential_rnn"
        )
    return decision


def _state_shape(x: Tensor, cell: str, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (sequences, 2, *x.shape[3:]) if cell == "lstm" else (sequences, *x.shape[3:])


def _legend(cell: str) -> str:
    return "[sequences, 2 (c, h), ...]" if cell == "lstm" else "[sequences, ...]"


@explained_by(_plan)
def newton_rnn(
    x: Tensor,
    r: Tensor,
    *,
    cell: str = "gru",
    peephole: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 8,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ParaRNN's GRU or LSTM, all time steps solved together by Newton's method, the gradient by one linear solve.

    gru:  z, s = sigmoid(x_z + R_z h), sigmoid(x_s + R_s h); h' = (1 - z) h + z tanh(x_c + R_c (s h)).
    lstm: f = sigmoid(x_f + R_f h + p_f c); c' = f c + (1 - f) tanh(x_c + R_c h);
          o = sigmoid(x_o + R_o h + p_o c'); h' = o tanh(c').

    Args:
        x: gate inputs W x_t + b, [B, T, 3, N] or [B, T, 3, H, D], any trailing sizes; gates (z, s, c) or (f, o, c).
        r: recurrent weights: diagonal [3, ...] with the trailing sizes of x, or a matrix per head [3, H, D, D] whose
            rows meet the state (h R, the transpose of `nn.GRU`'s); D <= 16 then.
        cell: "gru" or "lstm" (input gate coupled to the forget gate).
        peephole: weights (p_f, p_o) from c to the gates, [2, ...]; none when None. lstm only.
        initial_state: [B, ...] (gru: h) or [B, 2, ...] (lstm: c, h), per sequence when packed; zeros when None.
        reset: bool [B, T], True where the state is forgotten before the token is read.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        chunk: steps walked one after the other while the chunks run side by side, a power of two; None takes the
            backend's own (64; 32 on Triton). 1 is ParaRNN's Newton over every token.
        tolerance: largest accepted gap between a chunk's end and the next one's start, relative to the largest state;
            None takes 1e-6 (1e-12 in float64).
        max_iterations: Newton corrections per block of time before it is walked token by token; 0 walks everything.
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        h: [B, T, ...] in the dtype of `x`; computed and kept in float32.
        final_state: as `initial_state`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: two to four walks over T / C chunks at once, about 10 to 25 operations per unit and walk; keeps x, h, and c
        or the candidates. On CPU a batch of 16384 units or more is walked token by token, which is faster there.
    Source: ParaRNN. Differences: Newton over chunk starts instead of every token (fewer iterations, converges on larger
        weights), state in and out, the residual checked, blocks that fail walked token by token, both reported.

    Example:
        >>> x = torch.zeros(1, 3, 3, 1)
        >>> x[:, :, 2] = 100.0                 # the candidate is 1, the update gate one half
        >>> h, last = newton_rnn(x, torch.zeros(3, 1))
        >>> h.flatten().tolist(), last.item()
        ([0.5, 0.75, 0.875], 0.875)
    """
    h, final, _ = newton_rnn_with_report(
        x,
        r,
        cell=cell,
        peephole=peephole,
        initial_state=initial_state,
        reset=reset,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        tolerance=tolerance,
        max_iterations=max_iterations,
        backend=backend,
    )
    return h, final


@explained_by(_plan)
def newton_rnn_with_report(
    x: Tensor,
    r: Tensor,
    *,
    cell: str = "gru",
    peephole: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 8,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, NewtonReport]:
    """`newton_rnn`, and what it took: corrections, residual and fall-backs per block of time.

    Example:
        >>> _, _, report = newton_rnn_with_report(torch.randn(1, 256, 3, 4), torch.zeros(3, 4), chunk=16)
        >>> report.sequential.tolist(), report.tolerance
        ([False], 1e-06)
    """
    decision = _plan(
        x,
        r,
        cell=cell,
        peephole=peephole,
        initial_state=initial_state,
        reset=reset,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        tolerance=tolerance,
        max_iterations=max_iterations,
        backend=backend,
    )
    if tolerance is None:
        tolerance = 1e-12 if state_dtype(x.dtype) == torch.float64 else 1e-6
    units = x.shape[3:]
    is_block = r.dim() == x.dim() - 1
    flat_x = x if is_block else x.reshape(*x.shape[:3], -1)
    flat_r = r if is_block else r.reshape(GATES, -1)
    flat_peephole = None if peephole is None else peephole if is_block else peephole.reshape(2, -1)
    parts = 2 if cell == "lstm" else 1
    h0 = None
    if initial_state is not None:
        h0 = initial_state.reshape(initial_state.shape[0], parts, *flat_x.shape[3:])
    if decision.backend == "reference":
        h, final = newton_rnn_reference(flat_x, flat_r, flat_peephole, h0, cell, reset, cu_seqlens)
        counts, residual = torch.full((1,), -1, dtype=torch.int32, device=x.device), x.new_zeros(1)
    else:
        if decision.backend == "chunked":
            block = chunked.own_block(x.shape[0] * units.numel(), decision.chunk, wide=chunk is None)
        else:
            block = min(TRITON_ROWS, BLOCK_TANGENTS // parts if is_block else TRITON_ROWS) * decision.chunk
        h, _, final, counts, residual = solved(
            flat_x,
            flat_r,
            flat_peephole,
            h0,
            reset,
            cu_seqlens,
            cell,
            decision.chunk,
            block,
            tolerance,
            max_iterations,
            decision.backend,
        )
    residual = residual.detach()
    report = NewtonReport(counts, residual, (counts < 0) | ~(residual <= tolerance), tolerance)
    state = final.reshape(_state_shape(x, cell, cu_seqlens))
    return h.reshape(*x.shape[:2], *units).to(x.dtype), state, report
