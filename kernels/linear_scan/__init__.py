"""Diagonal linear recurrence h_t = a_t * h_{t-1} + u_t, real or complex: minGRU, minLSTM, LRU, S5, HGRN, RG-LRU."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import require_alike, require_cu_seqlens, require_reset, require_shape, state_dtype
from kernels.common.dispatch import Decision, choose, explained_by, too_many
from kernels.linear_scan import chunked
from kernels.linear_scan.reference import linear_scan_reference

__all__ = ["linear_scan"]

OP = "linear_scan"


def _plan(
    a: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    require_alike(OP, {"u": u, "a": a, "initial_state": initial_state}, or_complex=True)
    if u.dim() < 2 or u.shape[1] < 1:
        raise ValueError(f"{OP}: u must be [B, T, ...] with T >= 1, got {list(u.shape)}")
    require_shape(OP, "a", a, tuple(u.shape), "the shape of u")
    if a.is_complex() != u.is_complex():
        raise ValueError(f"{OP}: a and u must both be real or both complex, got {a.dtype} and {u.dtype}")
    require_cu_seqlens(OP, cu_seqlens, u)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        require_shape(OP, "initial_state", initial_state, (sequences, *u.shape[2:]), "[sequences, ...]")
        if initial_state.is_complex() and not u.is_complex():
            raise ValueError(f"{OP}: initial_state must be real like u, got {initial_state.dtype} and {u.dtype}")
    require_reset(OP, reset, u)
    refusal = too_many("channels", u.shape[2:].numel(), 32)
    decision = choose(OP, backend, u, chunk=chunk, refusal=refusal, triton_chunk=32, any_chunk=True)
    is_own = decision.backend == "chunked" and chunk is None
    return replace(decision, chunk=chunked.CHUNK) if is_own else decision


@explained_by(_plan)
def linear_scan(
    a: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the diagonal recurrence h_t = a_t * h_{t-1} + u_t along time.

    Args:
        a: gate per step [B, T, ...], any trailing sizes; above 1 in magnitude is not checked and may overflow.
        u: input per step, same shape; real or complex like `a`.
        initial_state: state before the first step [B, ...] (per sequence when packed); zeros when None.
        reset: bool [B, T], True where the state is forgotten before the token is read.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.
        chunk: steps of a chunk, all chunks side by side; None takes the backend's own (40; 32 on Triton, which has 16,
            32 and 64).
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        h: every state [B, T, ...] in the dtype of `u`; accumulated in float32 (float64 for float64 inputs).
        final_state: the last state [B, ...], float32 or complex64 (float64, complex128 for such inputs).
        The gradient of `a` uses the returned h: with 16-bit `u` it carries h's rounding.

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: O(B*T*N) work; forward 12, backward 20 bytes per element in float32 on Triton; keeps `a` and `h`.
    Source: minGRU/LRU/S5 and others; backward is the same scan reversed, gate shifted by one and conjugated.
    Differences: no log-space form: it loses two digits of the gradient.

    Example:
        >>> h, last = linear_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
        >>> h.flatten().tolist(), last.item()
        ([1.0, 1.5, 1.75], 1.75)
    """
    decision = _plan(
        a, u, initial_state=initial_state, reset=reset, cu_seqlens=cu_seqlens, chunk=chunk, backend=backend
    )
    if reset is not None:
        a = a.masked_fill(reset.reshape(*reset.shape, *[1] * (a.dim() - 2)), 0)
    # counted, not -1, which an empty batch leaves open
    channels = u.shape[2:].numel()
    flat_a, flat_u = a.reshape(*a.shape[:2], channels), u.reshape(*u.shape[:2], channels)
    h0 = None if initial_state is None else initial_state.reshape(initial_state.shape[0], channels)
    if decision.backend == "reference":
        h, final = linear_scan_reference(flat_a, flat_u, h0, cu_seqlens)
    else:
        h, final = _forward(flat_a, flat_u, h0, cu_seqlens, decision.chunk, decision.backend)
    return h.reshape(u.shape), final.reshape(final.shape[0], *u.shape[2:])


def _engine(backend: str) -> Any:
    if backend == "chunked":
        return chunked
    from kernels.linear_scan import triton

    return triton


@torch.library.custom_op("cl_kernels::linear_scan", mutates_args=())
def _forward(
    a: Tensor, u: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None, chunk: int, backend: str
) -> tuple[Tensor, Tensor]:
    h, final = _engine(backend).forward(a, u, h0, cu_seqlens, chunk)
    return h, final


@_forward.register_fake
def _(a: Tensor, u: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty(sequences, u.shape[2], dtype=state_dtype(u.dtype))


@torch.library.custom_op("cl_kernels::linear_scan_backward", mutates_args=())
def _backward(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    da, du, dh0 = _engine(backend).backward(dh, dfinal, a, h, h0, cu_seqlens, chunk)
    return da, du, dh0


@_backward.register_fake
def _(dh: Tensor, dfinal: Tensor, a: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, h0, cu_seqlens, ctx.chunk, ctx.backend = inputs
    ctx.save_for_backward(a, output[0], h0, cu_seqlens)


def _differentiate(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    a, h, h0, cu_seqlens = ctx.saved_tensors
    da, du, dh0 = _backward(dh, dfinal, a, h, h0, cu_seqlens, ctx.chunk, ctx.backend)
    if h0 is not None:
        dh0 = (dh0 if h0.is_complex() else dh0.real).to(h0.dtype)
    return da, du, None if h0 is None else dh0, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
