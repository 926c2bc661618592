"""The delta rule: DeltaNet (no decay), Gated DeltaNet (one decay per head), KDA (a decay per channel)."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import cotangents, gate_like, last_like, matrix_state_plan
from kernels.common.dispatch import Decision, choose, explained_by, matrix_chunk, matrix_size, without_autocast
from kernels.common.varlen import empty_outputs
from kernels.delta_rule import chunked
from kernels.delta_rule.reference import delta_rule_reference

__all__ = ["delta_rule"]

OP = "delta_rule"
# the walk keeps all of K on chip
MOST_K = 256


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    refusal = matrix_state_plan(OP, q, k, v, beta, g, initial_state, cu_seqlens, scale)
    if refusal is None and q.shape[3] > MOST_K:
        refusal = f"needs K <= {MOST_K}, got {q.shape[3]} (or split heads)"
    own = matrix_chunk(v.dtype, per_channel=g is not None and g.dim() == 4, wide=True)
    size = matrix_size(q, v)
    return choose(OP, backend, v, chunk=chunk, length=q.shape[1], refusal=refusal, triton_chunk=own, **size)


@explained_by(_plan)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Error-correcting linear attention: S' = diag(exp g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T.

    The output is o_t = scale * S_t^T q_t.

    Args:
        q: queries [B, T, H, K]; k: keys, same shape, meant to have length 1: with beta |k|^2 above 2 the recurrence
            itself explodes. See `normalize`.
        v: values [B, T, H, V].
        beta: step size [B, T, H], in [0, 1], or [0, 2] for negative eigenvalues.
        g: log decay, at most 0: None (DeltaNet), [B, T, H] or constant [H] (Gated DeltaNet), [B, T, H, K] (KDA); -inf
            wipes the state.
        scale: factor of q; None takes K ** -0.5.
        normalize: divide every q and k by sqrt(|x|^2 + 1e-6) inside the kernels, so that no normalised copy is ever
            written; the gradients are those of the q and k given.
        initial_state: [B, H, K, V] (per sequence when packed); zeros when None.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        chunk: tokens per chunk, a power of two; None takes the backend's own. Changes rounding, never the result.
        backend: "auto", "reference", "chunked", "numba" (compiled for a CPU, the automatic one there up to 4096 numbers
            of a matrix, in calls with work enough for its compiling) or "triton" (K <= 256).

    Returns:
        o: outputs [B, T, H, V] in the dtype of `v`.
        final_state: last state [B, H, K, V], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: gated linear attention plus a triangular solve of C(K + V) operations per token and head; keeps the inputs and
        one state per chunk.
    Source: DeltaNet, Gated DeltaNet, Kimi Delta Attention. Differences: triangular solve, no inverse by squaring, which
        fails on correlated keys even in float32.

    Example:
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> o, state = delta_rule(q, k, v, torch.full((1, 3, 1), 0.5))
        >>> o.flatten().tolist(), state.item()
        ([0.5, 0.75, 0.875], 0.875)
    """
    decision = _plan(
        q,
        k,
        v,
        beta,
        g,
        scale=scale,
        normalize=normalize,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        backend=backend,
    )
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    if g is not None and g.dim() == 1:
        g = g.expand(q.shape[:3])
    if decision.backend == "reference":
        return delta_rule_reference(q, k, v, beta, g, initial_state, scale, normalize, cu_seqlens)
    beta, g = gate_like(beta, v), gate_like(g, v)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, initial_state))
    how = (scale, decision.chunk, decision.backend, normalize, save)
    o, final, _ = _forward(q, k, v, beta, g, initial_state, cu_seqlens, *how)
    return o, final


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return chunked
    return import_module(f"kernels.delta_rule.{backend}")


@torch.library.custom_op("cl_kernels::delta_rule", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, final, states = _engine(backend).forward(q, k, v, beta, g, h0, cu_seqlens, scale, chunk, normalize, save)
    return o, final, states


@_forward.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, cu_seqlens, _, chunk, _, _, save = given
    return empty_outputs(q, v, cu_seqlens, chunk, save)


@torch.library.custom_op("cl_kernels::delta_rule_backward", mutates_args=())
@without_autocast
def _backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine = _engine(backend)
    given = (q, k, v, beta, g, states, cu_seqlens, scale, chunk, normalize)
    dq, dk, dv, dbeta, dg, dh0 = engine.backward(do, dfinal, *given)
    return dq, dk, dv, dbeta, q.new_empty(0) if dg is None else dg, dh0


@_backward.register_fake
def _(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, states: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    dh0 = dfinal.new_empty(dfinal.shape, dtype=states.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), beta.new_empty(beta.shape), dg, dh0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, g, h0, cu_seqlens, ctx.scale, ctx.chunk, ctx.backend, ctx.normalize, _ = inputs
    ctx.h0_dtype = None if h0 is None else h0.dtype
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, output[2], cu_seqlens)


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, states, cu_seqlens = ctx.saved_tensors
    do, dfinal = cotangents((do, v), (dfinal, last_like(states, len(v), cu_seqlens)))
    dq, dk, dv, dbeta, dg, dh0 = _backward(
        do, dfinal, q, k, v, beta, g, states, cu_seqlens, ctx.scale, ctx.chunk, ctx.backend, ctx.normalize
    )
    start = None if ctx.h0_dtype is None else dh0.to(ctx.h0_dtype)
    return dq, dk, dv, dbeta, None if g is None else dg, start, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)
