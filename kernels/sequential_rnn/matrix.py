"""The M2RNN: a nonlinear recurrence whose state is a matrix per head."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import (
    cotangents,
    last_like,
    require_alike,
    require_cu_seqlens,
    require_numbers,
    require_reset,
    require_shape,
    state_dtype,
)
from kernels.common.dispatch import Decision, choose, explained_by, without_autocast
from kernels.common.varlen import num_chunks
from kernels.sequential_rnn import m2rnn_chunked
from kernels.sequential_rnn.reference import m2rnn_reference

OP = "m2rnn"
# the transition matrix of a head stays on the chip
MOST_V = 64


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: float | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    require_alike(OP, {"q": q, "k": k, "v": v, "f": f, "w": w, "initial_state": initial_state})
    if q.dim() != 4 or min(q.shape) < 1:
        raise ValueError(f"{OP}: q must be [B, T, H, K] with no empty size, got {list(q.shape)}")
    require_shape(OP, "k", k, tuple(q.shape), "the shape of q")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] < 1:
        raise ValueError(f"{OP}: v must be [B, T, H, V] with B, T, H of q {list(q.shape[:3])}, got {list(v.shape)}")
    require_shape(OP, "f", f, tuple(q.shape[:3]), "[B, T, H]")
    heads, values = q.shape[2], v.shape[3]
    if tuple(w.shape) not in ((values, values), (heads, values, values)):
        raise ValueError(
            f"{OP}: w must be [V, V] = {[values, values]} or [H, V, V] = {[heads, values, values]}, got {list(w.shape)}"
        )
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{OP}: q, k and v must share one dtype, got {q.dtype} and {name} {t.dtype}")
    require_cu_seqlens(OP, cu_seqlens, q)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        require_shape(
            OP, "initial_state", initial_state, (sequences, heads, q.shape[3], values), "[sequences, H, K, V]"
        )
    require_reset(OP, reset, q)
    require_numbers(OP, above_zero=True, clip=clip)
    refusal = f"needs V <= {MOST_V}, got {values} (or more heads)" if values > MOST_V else None
    decision = choose(OP, backend, v, chunk=chunk, length=q.shape[1], refusal=refusal, triton_chunk=32, has_numba=True)
    if clip is not None and decision.backend == "reference":
        raise ValueError(f"{OP}: clip changes the gradient, the reference has autograd's; use another backend")
    return decision


@explained_by(_plan)
def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: float | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Matrix-to-matrix RNN: Z_t = tanh(S_{t-1} W + k_t v_t^T), S_t = f_t S_{t-1} + (1 - f_t) Z_t, o_t = S_t^T q_t.

    Args:
        q: queries [B, T, H, K]; k: keys, same shape; v: values [B, T, H, V].
        f: forget gate [B, T, H], in [0, 1] (not checked).
        w: transition [V, V], shared by the heads, or [H, V, V].
        initial_state: [B, H, K, V] (per sequence when packed); zeros when None.
        reset: bool [B, T], True where the state is forgotten before the token is read.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        clip: bound on every element of the gradient of S_t on its way back; None leaves it alone.
        chunk: steps between two kept states, a power of two; None takes the backend's own (32). Trades memory for
            nothing else: every step is computed twice whatever it is.
        backend: "auto", "reference", "chunked" (the fused loop in torch), "numba" (compiled for a CPU, the automatic
            one there) or "triton" (V <= 64).

    Returns:
        o: [B, T, H, V] in the dtype of `v`.
        final_state: last state [B, H, K, V], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: T steps in a row of 2KV^2 + 4KV operations per head; keeps the inputs and one state per chunk.
    Source: M2RNN. Differences: states kept every C steps instead of every step; no scale of q.

    Example:
        >>> one = torch.ones(1, 2, 1, 1)
        >>> o, state = m2rnn(one, 100 * one, one, torch.full((1, 2, 1), 0.5), torch.zeros(1, 1))
        >>> o.flatten().tolist(), state.item()
        ([0.5, 0.75], 0.75)
    """
    decision = _plan(
        q,
        k,
        v,
        f,
        w,
        initial_state=initial_state,
        reset=reset,
        cu_seqlens=cu_seqlens,
        clip=clip,
        chunk=chunk,
        backend=backend,
    )
    if w.dim() == 2:
        w = w.expand(q.shape[2], *w.shape)
    if decision.backend == "reference":
        o, final = m2rnn_reference(q, k, v, f, w, initial_state, reset, cu_seqlens)
        return o.to(v.dtype), final
    inputs = (q, k, v, f, w, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    bound = 0.0 if clip is None else clip
    o, final, _ = _forward(*inputs, reset, cu_seqlens, decision.chunk, bound, decision.backend, save)
    return o.to(v.dtype), final


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return m2rnn_chunked
    return import_module(f"kernels.sequential_rnn.{backend}_m2rnn")


@torch.library.custom_op("cl_kernels::m2rnn", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    clip: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, final, kept = _engine(backend).forward(q, k, v, f, w, s0, reset, cu_seqlens, chunk, save)
    return o, final, kept


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    clip: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (q.shape[2], q.shape[3], v.shape[3]), state_dtype(v.dtype)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = num_chunks(q.shape[0], q.shape[1], chunk, cu_seqlens) if save else 0
    out = v.new_empty(v.shape, dtype=dtype)
    return out, v.new_empty(sequences, *shape, dtype=dtype), v.new_empty(rows, *shape, dtype=dtype)


@torch.library.custom_op("cl_kernels::m2rnn_backward", mutates_args=())
@without_autocast
def _backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w: Tensor,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    clip: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, df, dw, ds0 = _engine(backend).backward(do, dfinal, q, k, v, f, w, kept, reset, cu_seqlens, chunk, clip)
    return dq, dk, dv, df, dw, ds0


@_backward.register_fake
def _(do: Tensor, dfinal: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, df, dw = (x.new_empty(x.shape) for x in inputs[:5])
    return dq, dk, dv, df, dw, dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, f, w, s0, reset, cu_seqlens, ctx.chunk, ctx.clip, ctx.backend, _ = inputs
    ctx.s0_dtype = None if s0 is None else s0.dtype
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, f, w, output[2], reset, cu_seqlens)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, f, w, kept, reset, cu_seqlens = ctx.saved_tensors
    do, dfinal = cotangents((do, v), (dfinal, last_like(kept, len(v), cu_seqlens)))
    dq, dk, dv, df, dw, ds0 = _backward(
        do, dfinal, q, k, v, f, w, kept, reset, cu_seqlens, ctx.chunk, ctx.clip, ctx.backend
    )
    start = None if ctx.s0_dtype is None else ds0.to(ctx.s0_dtype)
    return dq, dk, dv, df, dw, start, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)
