"""Recurrent attention: a Transformer block whose tokens attend to keys and values made from the block's own outputs."""

from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import (
    cotangents,
    require_alike,
    require_cu_seqlens,
    require_numbers,
    require_reset,
    require_shape,
    state_dtype,
)
from kernels.common.dispatch import Decision, choose, explained_by, without_autocast
from kernels.recurrent_attention import chunked
from kernels.recurrent_attention.reference import recurrent_attention_reference
from kernels.recurrent_attention.state import (
    RecurrentAttentionState,
    latest_last,
    looks_back_to,
    packed,
    side_by_side,
)

__all__ = ["RecurrentAttentionState", "recurrent_attention"]

OP = "recurrent_attention"
NO_TRITON = "has no kernel for it: a token waits for products with all weights of the block, which are torch's"


def _plan(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_out: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_up: Tensor | None = None,
    w_down: Tensor | None = None,
    *,
    slopes: Tensor | None = None,
    scale: float | None = None,
    initial_state: RecurrentAttentionState | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    named: dict[str, Tensor | None] = {"x": x, "q": q, "k": k, "v": v, "w_out": w_out, "w_k": w_k, "w_v": w_v}
    require_alike(OP, {**named, "w_up": w_up, "w_down": w_down, "slopes": slopes})
    if q.dim() != 4 or min(q.shape) < 1:
        raise ValueError(f"{OP}: q must be [B, T, H, K] with no empty size, got {list(q.shape)}")
    batch, length, heads, keys = q.shape
    require_shape(OP, "k", k, tuple(q.shape), "the shape of q")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] < 1:
        raise ValueError(f"{OP}: v must be [B, T, H, V] with B, T, H of q {list(q.shape[:3])}, got {list(v.shape)}")
    if x.dim() != 3 or x.shape[:2] != q.shape[:2] or x.shape[2] < 1:
        raise ValueError(f"{OP}: x must be [B, T, D] with B, T of q {list(q.shape[:2])}, got {list(x.shape)}")
    width, values = x.shape[2], v.shape[3]
    require_shape(OP, "w_out", w_out, (heads, values, width), "[H, V, D]")
    require_shape(OP, "w_k", w_k, (width, heads, keys), "[D, H, K]")
    require_shape(OP, "w_v", w_v, (width, heads, values), "[D, H, V]")
    if (w_up is None) != (w_down is None):
        raise ValueError(f"{OP}: w_up and w_down go together, got only {'w_down' if w_up is None else 'w_up'}")
    if w_up is not None and w_down is not None:
        inner = w_up.shape[-1]
        require_shape(OP, "w_up", w_up, (width, inner), "[D, M]")
        require_shape(OP, "w_down", w_down, (inner, width), "[M, D]")
    if slopes is not None:
        require_shape(OP, "slopes", slopes, (heads,), "[H]")
        if slopes.requires_grad:
            raise ValueError(f"{OP}: slopes are constants without a gradient, got a tensor that requires one")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != x.dtype:
            raise ValueError(f"{OP}: x, q, k and v must share one dtype, got {x.dtype} and {name} {t.dtype}")
    require_cu_seqlens(OP, cu_seqlens, x)
    require_reset(OP, reset, x)
    require_numbers(OP, scale=scale)
    _require_state(initial_state, q, v, batch if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    return choose(OP, backend, x, chunk=chunk, length=length, refusal=NO_TRITON)


def _require_state(state: RecurrentAttentionState | None, q: Tensor, v: Tensor, sequences: int) -> None:
    if state is None:
        return
    if not isinstance(state, RecurrentAttentionState):
        raise ValueError(f"{OP}: initial_state must be a RecurrentAttentionState, got {type(state).__name__}")
    require_alike(OP, {"q": q, "initial_state.keys": state.keys, "initial_state.values": state.values})
    number = state.keys.shape[1:2]
    require_shape(OP, "initial_state.keys", state.keys, (sequences, *number, *q.shape[2:]), "[S, N, H, K]")
    require_shape(OP, "initial_state.values", state.values, (sequences, *number, *v.shape[2:]), "[S, N, H, V]")
    require_shape(OP, "initial_state.first", state.first, (sequences,), "[S]")


@explained_by(_plan)
def recurrent_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_out: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_up: Tensor | None = None,
    w_down: Tensor | None = None,
    *,
    slopes: Tensor | None = None,
    scale: float | None = None,
    initial_state: RecurrentAttentionState | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentAttentionState]:
    """Run a block whose attention reads what its own outputs left behind, token by token, exactly.

    With n(z) = z / sqrt(mean z^2 + 1e-6), and keys and values k'_i, v'_i left by tokens i < t:
    a_t = softmax(scale q_t k'_i - slope (t - i), .., scale q_t k_t) over (v'_i, .., v_t), per head;
    u_t = x_t + sum over heads of a_t W_out;  y_t = u_t + gelu(n(u_t) W_up) W_down;
    k'_t = n(y_t) W_k, v'_t = n(y_t) W_v.

    Args:
        x: input of the block, the residual stream [B, T, D].
        q: queries [B, T, H, K]; k: a token's provisional key for itself, same shape; v: its value [B, T, H, V]. In the
            paper k, v = n(x) W_k, n(x) W_v: the same projection, of the input instead of the output.
        w_out: [H, V, D]; w_k: [D, H, K]; w_v: [D, H, V]; gains of a norm are factors of its projection's rows.
        w_up, w_down: inner layer [D, M], [M, D]; y = u without.
        slopes: ALiBi's slope of every head [H], a constant without gradient; 0 when None.
        scale: factor of q; None takes K ** -0.5.
        initial_state: as returned; nothing to look back at when None.
        reset: bool [B, T], True where all before is forgotten before the token is read.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1), read on the host; empty ones are allowed.
        chunk: tokens whose keys are read one query at a time, a power of two; None takes 32. Changes rounding, never
            the result.
        backend: "auto", "reference" or "chunked"; there is no kernel in Triton, "triton" is refused.

    Returns:
        y: outputs [B, T, D] in the dtype of `x`; computed in float32 (float64 for float64 inputs).
        final_state: `RecurrentAttentionState`, one row per sequence, T (packed: the longest's length) positions longer.

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: T steps in a row, each through all weights, whatever the batch: only a batch makes use of a machine. A key is
        read C + log2(T / C) times instead of T. Keeps the inputs, outputs, keys, values, attention and one number per
        query; scores are computed again, in squares of 128 queries. Packed sequences run side by side, padded to the
        longest.
    Source: The Recurrent Transformer (arXiv 2604.21215, abstract) and its released code for what a block computes.
        Differences: the tiling starts at chunks instead of single tokens; state, resets and packed sequences; the norm
        is n without bias, not LayerNorm, and keys are not normalised: our choice; no T x T weights in the backward.

    Example:
        >>> one, none = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
        >>> w = torch.ones(1, 1, 1)
        >>> y, state = recurrent_attention(one[..., 0], none, none, 4 * one, w, w, 2 * w)
        >>> [round(a, 3) for a in (y - 1).flatten().tolist()]     # means of values: 4; 2, 4; 2, 2, 4
        [4.0, 3.0, 2.667]
        >>> state.values.shape
        torch.Size([1, 3, 1, 1])
    """
    given = (w_out, w_k, w_v, w_up, w_down)
    decision = _plan(
        x,
        q,
        k,
        v,
        *given,
        slopes=slopes,
        scale=scale,
        initial_state=initial_state,
        reset=reset,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        backend=backend,
    )
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    tokens, weights = [x, q, k, v], [w for w in given if w is not None]
    if decision.backend == "reference":
        return recurrent_attention_reference(tokens, weights, initial_state, slopes, reset, scale, cu_seqlens)
    if cu_seqlens is not None:
        tokens = [side_by_side(t, cu_seqlens) for t in tokens]
        reset = None if reset is None else side_by_side(reset, cu_seqlens)
    y, after = _dense(tokens, weights, slopes, initial_state, reset, scale, decision.chunk)
    if cu_seqlens is not None:
        y, after = packed(y, cu_seqlens), latest_last(after, cu_seqlens)
    return y.to(x.dtype), after


def _dense(
    tokens: list[Tensor],
    weights: list[Tensor],
    slopes: Tensor | None,
    state: RecurrentAttentionState | None,
    reset: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, RecurrentAttentionState]:
    """Sequences of one length."""
    x, q, _, v = tokens
    first, (batch, _, heads, width) = looks_back_to(state, reset), q.shape
    if state is None:
        kept = x.new_zeros(batch, heads, 0, width + v.shape[3], dtype=state_dtype(x.dtype))
    else:
        kept = torch.cat([state.keys, state.values], dim=-1).to(state_dtype(x.dtype)).transpose(1, 2)
    y, left, _, _ = _forward(tokens, weights, kept, first, slopes, scale, chunk)
    both = torch.cat([kept, left], dim=2).transpose(1, 2)
    if first is None:
        first = torch.zeros(batch, 1, dtype=torch.long, device=x.device)
    return y, RecurrentAttentionState(both[..., :width], both[..., width:], first[:, -1])


@torch.library.custom_op("cl_kernels::recurrent_attention", mutates_args=())
@without_autocast
def _forward(
    tokens: list[Tensor],
    weights: list[Tensor],
    kept: Tensor,
    first: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return chunked.forward(tokens, weights, kept, first, slopes, scale, chunk)


@_forward.register_fake
def _(tokens: list[Tensor], weights: list[Tensor], kept: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _, _, v = tokens
    (batch, length, heads, width), empty = v.shape, kept.new_empty
    rows = (batch * heads, length)
    return empty(x.shape), empty(batch, heads, length, kept.shape[3]), empty(*rows, width), empty(*rows, 1)


@torch.library.custom_op("cl_kernels::recurrent_attention_backward", mutates_args=())
@without_autocast
def _backward(
    dy: Tensor,
    dleft: Tensor,
    tokens: list[Tensor],
    weights: list[Tensor],
    kept: Tensor,
    first: Tensor | None,
    slopes: Tensor | None,
    saved: list[Tensor],
    scale: float,
    chunk: int,
) -> list[Tensor]:
    given = (tokens, weights, kept, first, slopes)
    dtokens, dweights, dkept = chunked.backward(dy, dleft, *given, saved, scale, chunk)
    return [*dtokens, *dweights, dkept]


@_backward.register_fake
def _(dy: Tensor, dleft: Tensor, tokens: list[Tensor], weights: list[Tensor], kept: Tensor, *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*tokens, *weights, kept)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, weights, kept, first, slopes, ctx.scale, ctx.chunk = inputs
    # what is kept has no gradient, and zeros of its size would be made for it at every backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tokens, kept, first, slopes, *output, *weights)


def _differentiate(ctx: Any, dy: Tensor | None, dleft: Tensor | None, *_: None) -> tuple[Any, ...]:
    found = list(ctx.saved_tensors)
    tokens, rest, saved, weights = found[:4], found[4:7], found[7:11], found[11:]
    dy, dleft = cotangents((dy, saved[0]), (dleft, saved[1]))
    *grads, dkept = _backward(dy, dleft, tokens, weights, *rest, saved, ctx.scale, ctx.chunk)
    return grads[:4], grads[4:], dkept, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
