"""Gated linear attention: RetNet, Mamba-2/SSD, simple GLA (one decay per head), GLA (per channel), mLSTM on top."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import cotangents, gate_like, last_like, matrix_state_plan
from kernels.common.dispatch import Decision, choose, explained_by, matrix_chunk, matrix_size, without_autocast
from kernels.common.varlen import empty_outputs
from kernels.gated_linear_attention import chunked
from kernels.gated_linear_attention.reference import gated_linear_attention_reference

__all__ = ["gated_linear_attention", "mlstm", "retention_decay"]

OP = "gated_linear_attention"


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    refusal = matrix_state_plan(OP, q, k, v, None, g, initial_state, cu_seqlens, scale)
    own = matrix_chunk(v.dtype, per_channel=g is not None and g.dim() == 4, wide=False)
    size = matrix_size(q, v)
    return choose(OP, backend, v, chunk=chunk, length=q.shape[1], refusal=refusal, triton_chunk=own, **size)


@explained_by(_plan)
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention with a decaying matrix state: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q: queries [B, T, H, K]; k: keys, same shape.
        v: values [B, T, H, V].
        g: log decay, at most 0: per head and token [B, T, H] (Mamba-2, mLSTM), constant per head [H] (RetNet, see
            `retention_decay`), per channel [B, T, H, K] (GLA), or None for no decay; -inf wipes the state. Not checked:
            above 0 may overflow.
        scale: factor of q; None takes K ** -0.5.
        initial_state: [B, H, K, V] (per sequence when packed); zeros when None.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        chunk: tokens per chunk, a power of two; None takes the backend's own. Changes rounding, never the result.
        backend: "auto", "reference", "chunked", "numba" (compiled for a CPU, the automatic one there up to 4096 numbers
            of a matrix, in calls with work enough for its compiling) or "triton".

    Returns:
        o: outputs [B, T, H, V] in the dtype of `v`.
        final_state: last state [B, H, K, V], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: 2C(K + V) + 4KV operations per token and head forward, about 3.5 times that with the backward; keeps the
        inputs and one state per chunk. A decay per channel costs log2(C) more score products.
    Source: RetNet, GLA, Mamba-2; gate gradients as sums over intervals (ours) instead of a difference of running sums.
    Differences: the GLA paper caps how fast a channel may decay; here any g <= 0 is exact, see common/channel_decay.py.

    Example:
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> o, state = gated_linear_attention(q, k, v, torch.full((1, 3, 1), 0.5).log())
        >>> [round(x, 4) for x in o.flatten().tolist()], round(state.item(), 4)
        ([1.0, 1.5, 1.75], 1.75)
    """
    decision = _plan(
        q, k, v, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, chunk=chunk, backend=backend
    )
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    if g is not None and g.dim() == 1:
        g = g.expand(q.shape[:3])
    if decision.backend == "reference":
        return gated_linear_attention_reference(q, k, v, g, initial_state, scale, cu_seqlens)
    g = gate_like(g, v)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, initial_state))
    o, final, _ = _forward(q, k, v, g, initial_state, cu_seqlens, scale, decision.chunk, decision.backend, save)
    return o, final


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return chunked
    return import_module(f"kernels.gated_linear_attention.{backend}")


@torch.library.custom_op("cl_kernels::gated_linear_attention", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, final, states = _engine(backend).forward(q, k, v, g, h0, cu_seqlens, scale, chunk, save)
    return o, final, states


@_forward.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, cu_seqlens, _, chunk, _, save = given
    return empty_outputs(q, v, cu_seqlens, chunk, save)


@torch.library.custom_op("cl_kernels::gated_linear_attention_backward", mutates_args=())
@without_autocast
def _backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dh0 = _engine(backend).backward(do, dfinal, q, k, v, g, states, cu_seqlens, scale, chunk)
    return dq, dk, dv, q.new_empty(0) if dg is None else dg, dh0


@_backward.register_fake
def _(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    dh0 = dfinal.new_empty(dfinal.shape, dtype=states.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, dh0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, h0, cu_seqlens, ctx.scale, ctx.chunk, ctx.backend, _ = inputs
    ctx.h0_dtype = None if h0 is None else h0.dtype
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, output[2], cu_seqlens)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, states, cu_seqlens = ctx.saved_tensors
    do, dfinal = cotangents((do, v), (dfinal, last_like(states, len(v), cu_seqlens)))
    dq, dk, dv, dg, dh0 = _backward(do, dfinal, q, k, v, g, states, cu_seqlens, ctx.scale, ctx.chunk, ctx.backend)
    start = None if ctx.h0_dtype is None else dh0.to(ctx.h0_dtype)
    return dq, dk, dv, None if g is None else dg, start, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)

# on top of the op, and importing it
from kernels.gated_linear_attention.mlstm import mlstm, retention_decay  # noqa: E402
