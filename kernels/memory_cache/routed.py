"""Routed states (mixture of memories): every token is written to, and read from, a few of several memories."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import require_alike, require_cu_seqlens, require_shape, state_dtype
from kernels.common.dispatch import Decision, explained_by
from kernels.memory_cache.base import base_call, base_plan
from kernels.memory_cache.reference import routed_memory_reference

OP = "routed_memory"


def _first(x: Tensor | None, per_memory: bool) -> Tensor | None:
    return x[:, :, 0] if x is not None and per_memory and x.dim() > 1 else x


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    router: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    top_k: int = 2,
    shared: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    require_alike(OP, {"q": q, "k": k, "router": router})
    per_memory = k.dim() == 5
    if router.dim() != 3 or router.shape[:2] != q.shape[:2] or router.shape[2] < 1:
        raise ValueError(f"{OP}: router must be [B, T, E] = {list(q.shape[:2])} and E >= 1, got {list(router.shape)}")
    memories = router.shape[2] + shared
    if not 1 <= top_k <= router.shape[2]:
        raise ValueError(f"{OP}: top_k must be between 1 and E = {router.shape[2]}, got {top_k}")
    for name, x in (("k", k), ("v", v), ("beta", beta), ("g", g)):
        if per_memory and x is not None and x.dim() > 1 and (x.dim() < 4 or x.shape[2] != memories):
            found_shape = list(x.shape)
            raise ValueError(f"{OP}: {name} must have a memory axis [B, T, {memories}, ...] like k, got {found_shape}")
    first_k, first_v, first_beta, first_g = (_first(x, per_memory) for x in (k, v, beta, g))
    found = base_plan(OP, q, first_k, first_v, first_beta, first_g, chunk, backend)
    require_cu_seqlens(OP, cu_seqlens, q)
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (sequences, memories, *q.shape[2:], v.shape[-1])
        require_shape(OP, "initial_state", initial_state, shape, "[sequences, memories, H, K, V]")
    return found


@explained_by(_plan)
def routed_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    router: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    top_k: int = 2,
    shared: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mixture of memories: o_t = sum over the top_k memories e of token t of softmax(router)_te S_e,t^T q_t.

    A memory changes (writes, decays) only at its own tokens, so it is an ordinary linear memory over a shorter
    sequence: tokens are sorted by memory and run as packed sequences.

    Args:
        q: queries [B, T, H, K], shared by all memories.
        k: keys [B, T, H, K], or one projection per memory [B, T, E, H, K]; v and, if given, beta and g then likewise
            with the memory axis third (a constant g [H] stays as it is).
        v: values [B, T, H, V] (or [B, T, E, H, V]).
        router: scores [B, T, E]; the gradient reaches the scores of the chosen memories.
        beta: step size: the memories are `delta_rule`s; None makes them `gated_linear_attention`s.
        g: log decay as there.
        top_k: memories per token.
        shared: one more memory, the last, that every token uses with weight 1.
        scale, chunk, backend: as in the op below; initial_state [B, E (+ 1), H, K, V] (per sequence when packed).
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed.

    Returns:
        o [B, T, H, V] in the dtype of v, and all memories [B, E (+ 1), H, K, V], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, or the backend asked for cannot run.

    Cost: top_k (+ 1) times the op below, and a sort of B * T * top_k numbers. Nothing waits for the device.
    Source: Mixture of Memories. Differences: the balance loss is the caller's, who has the router's scores.

    Example:
        >>> x = torch.ones(1, 3, 1, 1)
        >>> router = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
        >>> o, state = routed_memory(x, x, x, router, top_k=1)
        >>> o.flatten().tolist(), state.flatten().tolist()
        ([1.0, 1.0, 2.0], [2.0, 1.0])
    """
    decision = _plan(
        q,
        k,
        v,
        router,
        beta,
        g,
        top_k=top_k,
        shared=shared,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        backend=backend,
    )
    dtype, per_memory = state_dtype(v.dtype), k.dim() == 5
    memories = router.shape[2] + shared
    scores, chosen = router.topk(top_k, dim=-1)
    weights = scores.to(dtype).softmax(-1)
    if shared:
        chosen = torch.cat([chosen, torch.full_like(chosen[..., :1], memories - 1)], dim=-1)
        weights = torch.cat([weights, torch.ones_like(weights[..., :1])], dim=-1)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = initial_state
    if state is None:
        state = v.new_zeros(sequences, memories, *q.shape[2:], v.shape[-1], dtype=dtype)
    base = base_call(decision, float(q.shape[3]) ** -0.5 if scale is None else scale)
    tokens = [q, k, v, beta, g]
    if decision.backend == "reference":
        return _loop(tokens, chosen, weights, state.to(dtype), cu_seqlens, base, per_memory)
    slot = chosen + memories * _sequence_of(q, cu_seqlens)[..., None]
    order = slot.flatten().argsort(stable=True)
    ordered = slot.flatten()[order]
    offsets = torch.searchsorted(ordered, torch.arange(sequences * memories + 1, device=q.device))
    token, memory = order // chosen.shape[-1], ordered % memories

    def sorted_by_memory(x: Tensor | None, own: bool) -> Tensor | None:
        if x is None or x.dim() == 1:
            return x
        flat = x.flatten(0, 1)
        return (flat[token, memory] if own else flat[token])[None]

    parts = [sorted_by_memory(x, own=per_memory and i > 0) for i, x in enumerate(tokens)]
    out, final = base(*parts, state.flatten(0, 1), cu_seqlens=offsets)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    reads = out[0][back].view(*chosen.shape, *out.shape[2:])
    o = (weights[..., None, None] * reads.to(dtype)).sum(2)
    return o.to(v.dtype), final.view(state.shape)


def _sequence_of(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sequence number of every token [B, T] (or [B, 1])."""
    if cu_seqlens is None:
        return torch.arange(q.shape[0], device=q.device)[:, None]
    token = torch.arange(q.shape[1], device=q.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), token, right=True)[None]


def _loop(
    tokens: list[Tensor | None],
    chosen: Tensor,
    weights: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    base: Callable[..., Any],
    per_memory: bool,
) -> tuple[Tensor, Tensor]:
    """The reference, sequence by sequence."""
    v = tokens[2]
    assert v is not None
    spans = [(b, slice(None)) for b in range(v.shape[0])]
    if cu_seqlens is not None:
        spans = [(0, slice(begin, end)) for begin, end in pairwise(cu_seqlens.tolist())]
    outs, finals = [], []
    for s, (b, cut) in enumerate(spans):
        own = [x if x is None or x.dim() == 1 else x[b : b + 1, cut] for x in tokens]
        if chosen[b, cut].shape[0] == 0:
            finals.append(state[s])
            continue
        out, final = routed_memory_reference(own, chosen[b, cut], weights[b, cut], state[s], base, per_memory)
        outs.append(out)
        finals.append(final)
    o = torch.cat(outs, dim=1).view(*v.shape[:2], *outs[0].shape[2:])
    return o.to(v.dtype), torch.stack(finals)
