"""Nonlinear recurrences that must run in order: GRU, LSTM, sLSTM with a matrix per head, and the M2RNN."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import (
    cotangents,
    require_alike,
    require_cu_seqlens,
    require_reset,
    require_shape,
    state_dtype,
)
from kernels.common.dispatch import Decision, choose, explained_by, too_many, without_autocast
from kernels.sequential_rnn import chunked
from kernels.sequential_rnn.reference import GATES, PARTS, sequential_rnn_reference

__all__ = ["m2rnn", "sequential_rnn"]

OP = "sequential_rnn"
# widest head whose recurrent matrices Triton keeps next to the state
MOST_D = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
# numbers of a head's state in all sequences: beyond, one product for all is faster on a CPU than a loop for each
WIDE = 1024


def _plan(
    x: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    *,
    cell: str = "gru",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Decision:
    if cell not in GATES:
        raise ValueError(f"{OP}: unknown cell {cell!r}; use one of {', '.join(GATES)}")
    gates = GATES[cell]
    require_alike(OP, {"x": x, "r": r, "bias": bias, "initial_state": initial_state})
    if x.dim() != 5 or min(x.shape) < 1 or x.shape[2] != gates:
        raise ValueError(f"{OP}: x must be [B, T, {gates}, H, D] for {cell} with no empty size, got {list(x.shape)}")
    heads, width = x.shape[3:]
    require_shape(OP, "r", r, (gates, heads, width, width), "[G, H, D, D]")
    if bias is not None:
        require_shape(OP, "bias", bias, (gates, heads, width), "[G, H, D]")
    require_cu_seqlens(OP, cu_seqlens, x)
    if initial_state is not None:
        legend = "[sequences, H, D]" if PARTS[cell] == 1 else f"[sequences, {PARTS[cell]}, H, D]"
        require_shape(OP, "initial_state", initial_state, _state_shape(x, cell, cu_seqlens), legend)
    require_reset(OP, reset, x)
    most = MOST_D.get(x.dtype, 0)
    refusal = f"needs D <= {most} in {str(x.dtype).removeprefix('torch.')}, got {width}" if width > most else None
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    refusal = refusal or too_many("sequences", sequences, 16)
    is_wide = sequences * width > WIDE
    decision = choose(OP, backend, x, refusal=refusal, has_numba=True, is_wide=is_wide)
    return replace(decision, chunk=0)


def _state_shape(x: Tensor, cell: str, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (sequences, *x.shape[3:]) if PARTS[cell] == 1 else (sequences, PARTS[cell], *x.shape[3:])


@explained_by(_plan)
def sequential_rnn(
    x: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    *,
    cell: str = "gru",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a gated RNN with a recurrent matrix per head; a_g = x_g + h R_g + b_g unless said otherwise.

    gru:   r, z = sigmoid(a_r), sigmoid(a_z); n = tanh(x_n + r (h R_n + b_n)); h' = (1 - z) n + z h.
    lstm:  c' = sigmoid(a_f) c + sigmoid(a_i) tanh(a_g); h' = sigmoid(a_o) tanh(c').
    slstm: c' = f c + i tanh(a_z), n' = f n + i, h' = sigmoid(a_o) c' / n' with i = exp(a_i), f = sigmoid(a_f), all kept
           relative to exp(m'), m' = max(log f + m, a_i); slstm_exp: the same with f = exp(a_f).

    Args:
        x: gate inputs W x_t + b, [B, T, G, H, D]; gates (r, z, n), (i, f, g, o) as in torch, or (i, f, z, o).
        r: recurrent weights [G, H, D, D], rows meet the state (h R, the transpose of torch's `weight_hh`).
        bias: recurrent bias [G, H, D], inside the reset gate for the GRU's n; zeros when None.
        cell: "gru", "lstm", "slstm" or "slstm_exp".
        initial_state: gru [B, H, D]: h; lstm [B, 2, H, D]: c, h; slstm [B, 4, H, D]: c, n, m, h, where n = 0 is an
            empty memory, whatever m says; per sequence when packed; zeros when None.
        reset: bool [B, T], True where the state is forgotten before the token is read.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        backend: "auto", "reference", "chunked" (the fused loop in torch), "numba" (compiled for a CPU, the automatic
            one there up to 1024 numbers of a head in all sequences) or "triton" (D <= 128, in float32 <= 64).

    Returns:
        h: [B, T, H, D] in the dtype of `x`; computed and kept in float32.
        final_state: as `initial_state`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: T steps in a row of 2GD^2 operations per head; keeps x and the states. The backward takes gates and weight
        gradient out of its loop: one product before, one after.
    Source: GRU and LSTM as `torch.nn` has them; sLSTM of xLSTM. Differences: an empty sLSTM memory takes its scale from
        the first input gate, so that no first gate can underflow; the gradient goes through the maximum.

    Example:
        >>> x = torch.zeros(1, 2, 3, 1, 1)
        >>> x[:, :, 2] = 100.0                 # n is 1, the update gate one half
        >>> h, last = sequential_rnn(x, torch.zeros(3, 1, 1, 1))
        >>> h.flatten().tolist(), last.item()
        ([0.5, 0.75], 0.75)
    """
    decision = _plan(
        x, r, bias, cell=cell, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens, backend=backend
    )
    s0 = initial_state
    if s0 is not None:
        s0 = s0.reshape(s0.shape[0], PARTS[cell], *x.shape[3:])
    if decision.backend == "reference":
        h, final = sequential_rnn_reference(x, r, bias, s0, cell, reset, cu_seqlens)
    else:
        h, final, _ = _forward(x, r, bias, s0, reset, cu_seqlens, cell, decision.backend)
    return h.to(x.dtype), final.reshape(_state_shape(x, cell, cu_seqlens))


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return chunked
    return import_module(f"kernels.sequential_rnn.{backend}")


@torch.library.custom_op("cl_kernels::sequential_rnn", mutates_args=())
@without_autocast
def _forward(
    x: Tensor,
    r: Tensor,
    bias: Tensor | None,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    h, final, kept = _engine(backend).forward(x, r, bias, s0, reset, cu_seqlens, cell)
    return h, final, kept


@_forward.register_fake
def _(
    x: Tensor,
    r: Tensor,
    bias: Tensor | None,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(x.dtype)
    batch, length, _, heads, width = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = x.new_empty(batch, length, heads, width, dtype=dtype)
    kept = x.new_empty(PARTS[cell], batch * length, heads * width, dtype=dtype)
    return h, x.new_empty(sequences, PARTS[cell], heads, width, dtype=dtype), kept


@torch.library.custom_op("cl_kernels::sequential_rnn_backward", mutates_args=())
@without_autocast
def _backward(
    dh: Tensor,
    dfinal: Tensor,
    x: Tensor,
    r: Tensor,
    bias: Tensor | None,
    s0: Tensor | None,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dr, dbias, ds0 = _engine(backend).backward(dh, dfinal, x, r, bias, s0, kept, reset, cu_seqlens, cell)
    return dx, dr, dbias, ds0


@_backward.register_fake
def _(
    dh: Tensor, dfinal: Tensor, x: Tensor, r: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = r.new_empty(r.shape[:3]) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), r.new_empty(r.shape), dbias, dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, r, bias, s0, reset, cu_seqlens, ctx.cell, ctx.backend = inputs
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, r, bias, s0, reset, cu_seqlens, *output)


def _differentiate(ctx: Any, dh: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, r, bias, s0, reset, cu_seqlens, h, final, kept = ctx.saved_tensors
    dh, dfinal = cotangents((dh, h), (dfinal, final))
    dx, dr, dbias, ds0 = _backward(dh, dfinal, x, r, bias, s0, kept, reset, cu_seqlens, ctx.cell, ctx.backend)
    return dx, dr, None if bias is None else dbias, None if s0 is None else ds0.to(s0.dtype), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)

# beside the cells, with a state that is a matrix
from kernels.sequential_rnn.matrix import m2rnn  # noqa: E402
