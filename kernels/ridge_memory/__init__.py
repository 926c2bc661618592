"""Ridge memory (Gated KalmaNet): online ridge regression over all past tokens, read by a solve at every token."""

from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import cotangents, matrix_state_plan, require_numbers, require_shape, state_dtype
from kernels.common.dispatch import WORTH_COMPILING, Decision, choose, explained_by, without_autocast
from kernels.common.varlen import num_chunks
from kernels.gated_linear_attention import gated_linear_attention
from kernels.ridge_memory import chunked, implicit
from kernels.ridge_memory.reference import ridge_memory_reference

__all__ = ["ridge_memory"]

OP = "ridge_memory"
# Triton's solver keeps the state and a chunk of iterates on chip; what that takes at K = 128, in bytes
MOST_K = 128
MOST_SHARED = {torch.float32: 180_224, torch.float16: 114_688, torch.bfloat16: 114_688}


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    mix: Tensor | None = None,
    *,
    ratio: float = 0.02,
    floor: float = 1e-6,
    steps: int = 30,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    refusal = matrix_state_plan(OP, q, k, v, beta, g, None, cu_seqlens, scale)
    if g is not None and g.dim() == 4:
        raise ValueError(f"{OP}: g must be [B, T, H] or [H] (H stays symmetric), got {list(g.shape)}")
    if mix is not None:
        require_shape(OP, "mix", mix, tuple(q.shape[:3]), "[B, T, H]")
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (sequences, *q.shape[2:], q.shape[3] + v.shape[3])
        require_shape(OP, "initial_state", initial_state, shape, "[sequences, H, K, K + V]")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{OP}: steps must be a whole number of at least 1, got {steps!r}")
    require_numbers(OP, above_zero=True, ratio=ratio, floor=floor)
    wide = q.shape[3] > 64
    if refusal is None and q.shape[3] > MOST_K:
        refusal = f"needs K <= {MOST_K}, got {q.shape[3]} (or split heads)"
    if refusal is None and wide and v.is_cuda:
        needed, kind = MOST_SHARED.get(v.dtype, 0), str(v.dtype).removeprefix("torch.")
        shared = getattr(torch.cuda.get_device_properties(v.device), "shared_memory_per_block_optin", needed)
        if shared < needed:
            refusal = f"needs K <= 64 in {kind} on a card with {shared} bytes of shared memory, got {q.shape[3]}"
    own = 16 if wide and v.dtype == torch.float32 else 32
    return choose(
        OP,
        backend,
        v,
        chunk=chunk,
        length=q.shape[1],
        refusal=refusal,
        triton_chunk=own,
        has_numba=True,
        # wider heads were not measured
        is_wide=q.shape[3] > MOST_K,
        is_small=k.numel() * v.shape[3] < WORTH_COMPILING,
    )


@explained_by(_plan)
def ridge_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    mix: Tensor | None = None,
    *,
    ratio: float = 0.02,
    floor: float = 1e-6,
    steps: int = 30,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Ridge regression of values on keys over all tokens so far: o_t = scale U_t^T (H_t + lambda_t I)^-1 q_t.

    H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T, U_t = exp(g_t) U_{t-1} + beta_t k_t v_t^T, and
    lambda_t = ratio |H_t|_F + floor. The solution of the system is called x_t.

    Args:
        q: queries [B, T, H, K]; k: keys, same shape, meant to have length 1 (not normalised here).
        v: values [B, T, H, V].
        beta: weight of a token's error [B, T, H], at least 0; None takes 1.
        g: log decay, at most 0: per head and token [B, T, H], constant [H], or None.
        mix: [B, T, H] in [0, 1]: o_t reads with mix q_t + (1 - mix) x_t, 1 being linear attention; None takes 0.
        ratio: strength of the regularisation relative to |H_t|; the condition number is at most 1 + 1 / ratio.
        floor: strength where there is nothing to be relative to (no key yet), above 0.
        steps: Chebyshev steps of each solve, forward and backward. Relative error of x at ratio 0.02: 9e-2 after 10
            steps, 5e-3 after 20, 3e-4 after 30; at ratio 0.1 1e-8 after 30. The backend "reference" solves exactly.
        scale: factor of the output.
        initial_state: [B, H, K, K + V] (per sequence when packed), H then U; H is taken symmetric and must be positive
            semi-definite. Zeros when None.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        chunk: tokens per chunk, a power of two; None takes the backend's own. Changes rounding, never the result.
        backend: "auto", "reference", "chunked", "numba" (compiled for a CPU and the automatic one there up to K = 128,
            in calls long enough to be worth compiling for their K) or "triton" (K <= 128).

    Returns:
        o: outputs [B, T, H, V] in the dtype of `v`.
        final_state: last state [B, H, K, K + V], float32 (float64 for float64 inputs): H then U.

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: steps * (2 K^2 + 4 C K) operations per token and head for the solves, the same again in the backward, and two
        gated linear attentions (four backward); keeps inputs in float32, x, and two states per chunk. In compiled loops
        steps * 2 K^2 for the solves.
    Source: Gated KalmaNet; gradients by implicit differentiation, lambda's dependence on H_t included.
    Differences: 16-bit inputs are computed in float32 throughout (rounding x to bfloat16 would cost up to the condition
        number times its precision), on Triton with plain tf32 products inside the solver; the floor is ours.

    Example:
        >>> q = k = torch.eye(2).view(1, 2, 1, 2)
        >>> v = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
        >>> o, state = ridge_memory(q, k, v, ratio=0.01, steps=60)
        >>> [round(x, 3) for x in o.flatten().tolist()]
        [2.97, 4.93]
        >>> state.shape
        torch.Size([1, 1, 2, 3])
    """
    decision = _plan(
        q,
        k,
        v,
        beta,
        g,
        mix,
        ratio=ratio,
        floor=floor,
        steps=steps,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        backend=backend,
    )
    width, dtype = q.shape[3], state_dtype(v.dtype)
    if g is not None and g.dim() == 1:
        g = g.expand(q.shape[:3])
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = v.new_zeros(sequences, *q.shape[2:], width + v.shape[3], dtype=dtype)
    h0, u0 = initial_state.to(dtype)[..., :width], initial_state.to(dtype)[..., width:]
    h0 = (h0 + h0.mT) / 2
    if decision.backend == "reference":
        start = torch.cat([h0, u0], dim=-1)
        return ridge_memory_reference(q, k, v, beta, g, mix, start, ratio, floor, scale, cu_seqlens)
    qs, ks, values = (x.to(dtype) for x in (q, k, v))
    gate = None if g is None else g.to(dtype)
    fast = v.dtype in (torch.bfloat16, torch.float16)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, beta, g, h0))
    weight = None if beta is None else beta.to(dtype)
    x, h_final, *_ = _forward(
        qs, ks, weight, gate, h0, cu_seqlens, ratio, floor, steps, decision.chunk, decision.backend, fast, save
    )
    if mix is not None:
        x = torch.lerp(x, qs, mix.to(dtype)[..., None])
    if weight is not None:
        values = values * weight[..., None]
    o, u_final = gated_linear_attention(
        x,
        ks,
        values,
        gate,
        scale=scale,
        initial_state=u0,
        cu_seqlens=cu_seqlens,
        chunk=decision.chunk,
        # narrow heads are read by compiled loops too
        backend=backend if decision.backend == "numba" else decision.backend,
    )
    return o.to(v.dtype), torch.cat([h_final, u_final], dim=-1)


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return chunked
    from kernels.ridge_memory import triton

    return triton


@torch.library.custom_op("cl_kernels::ridge_solve", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    backend: str,
    fast: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "numba":
        from kernels.ridge_memory import numba

        x, final, kept = numba.forward(q, k, beta, g, h0, cu_seqlens, ratio, floor, steps, chunk, save)
        return x, final, q.new_empty(0), q.new_empty(0), kept if save else kept.new_empty(0)
    found = implicit.forward(_engine(backend), q, k, beta, g, h0, cu_seqlens, ratio, floor, steps, chunk, fast)
    return *found[:4], found[4] if save else found[4].new_empty(0)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    backend: str,
    fast: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (num_chunks(q.shape[0], q.shape[1], chunk, cu_seqlens), *h0.shape[1:]) if save else (0,)
    # the compiled loops find |H|^2 again
    n = q.new_empty((0,) if backend == "numba" else q.shape[:3])
    return q.new_empty(q.shape), h0.new_empty(h0.shape), n, torch.empty_like(n), h0.new_empty(rows)


@torch.library.custom_op("cl_kernels::ridge_solve_backward", mutates_args=())
@without_autocast
def _backward(
    dx: Tensor,
    dfinal: Tensor,
    x: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor,
    n: Tensor,
    y: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    backend: str,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "numba":
        from kernels.ridge_memory import numba

        dq, dk, dbeta, dg, dh0 = numba.backward(
            dx, dfinal, x, k, beta, g, states, cu_seqlens, ratio, floor, steps, chunk
        )
    else:
        dq, dk, dbeta, dg, dh0 = implicit.backward(
            _engine(backend), dx, dfinal, x, k, beta, g, h0, n, y, states, cu_seqlens, ratio, floor, steps, chunk, fast
        )
    return dq, dk, x.new_empty(0) if dbeta is None else dbeta, x.new_empty(0) if dg is None else dg, dh0


@_backward.register_fake
def _(
    dx: Tensor, dfinal: Tensor, x: Tensor, k: Tensor, beta: Tensor | None, g: Tensor | None, h0: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbeta = x.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    dg = x.new_empty(0) if g is None else g.new_empty(g.shape)
    return x.new_empty(x.shape), k.new_empty(k.shape), dbeta, dg, h0.new_empty(h0.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, beta, g, h0, cu_seqlens, *ctx.how, _ = inputs
    x, _, n, y, states = output
    ctx.mark_non_differentiable(n, y, states)
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, k, beta, g, h0, n, y, states, cu_seqlens)


def _differentiate(ctx: Any, dx: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, _, beta, g, h0, *_ = ctx.saved_tensors
    dx, dfinal = cotangents((dx, x), (dfinal, h0))
    dq, dk, dbeta, dg, dh0 = _backward(dx, dfinal, *ctx.saved_tensors, *ctx.how)
    return dq, dk, None if beta is None else dbeta, None if g is None else dg, dh0, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)
