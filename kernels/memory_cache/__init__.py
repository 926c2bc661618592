"""Memory caching: linear memories that keep their states at segment ends and read from all of them; routed memories."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.common.checks import require_cu_seqlens, require_shape, state_dtype
from kernels.common.dispatch import Decision, explained_by, without_autocast
from kernels.memory_cache import chunked
from kernels.memory_cache.base import base_call, base_plan
from kernels.memory_cache.reference import memory_cache_reference
from kernels.memory_cache.routed import routed_memory
from kernels.memory_cache.state import (
    VARIANTS,
    WRITES,
    MemoryCacheState,
    Options,
    logarithmic_segments,
    segments_of,
)

__all__ = ["MemoryCacheState", "logarithmic_segments", "memory_cache", "routed_memory"]

OP = "memory_cache"
States = MemoryCacheState | Sequence[MemoryCacheState] | None


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    segment: int | Sequence[int],
    variant: str = "gated",
    write: str = "carry",
    route_q: Tensor | None = None,
    route_k: Tensor | None = None,
    top_k: int = 2,
    scale: float | None = None,
    initial_state: States = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Decision:
    found = base_plan(OP, q, k, v, beta, g, chunk, backend)
    require_cu_seqlens(OP, cu_seqlens, q)
    for name, value, allowed in (("variant", variant, VARIANTS), ("write", write, WRITES)):
        if value not in allowed:
            raise ValueError(f"{OP}: unknown {name} {value!r}; use one of {', '.join(allowed)}")
    if (route_q is None) != (variant == "residual") or (route_k is None) != (variant == "residual"):
        needs = "takes neither" if variant == "residual" else "needs both"
        raise ValueError(f"{OP}: variant {variant!r} {needs} route_q and route_k [B, T, H, R]")
    if route_q is not None and route_k is not None:
        if route_q.dim() != 4 or route_q.shape[:3] != q.shape[:3]:
            raise ValueError(f"{OP}: route_q must be [B, T, H, R] with B, T, H of q, got {list(route_q.shape)}")
        require_shape(OP, "route_k", route_k, tuple(route_q.shape), "the shape of route_q")
    if top_k < 1:
        raise ValueError(f"{OP}: top_k must be at least 1, got {top_k}")
    _require_segment(segment, q.shape[1], initial_state, cu_seqlens)
    if initial_state is not None:
        width, states = 0 if route_q is None else route_q.shape[3], [initial_state]
        if cu_seqlens is not None:
            if isinstance(initial_state, MemoryCacheState) or len(initial_state) != cu_seqlens.shape[0] - 1:
                raise ValueError(f"{OP}: initial_state of packed sequences must be one state for each of them")
            states = list(initial_state)
        for state in states:
            _require_state(state, q, v, width, segment)
    return found


def _require_segment(
    segment: int | Sequence[int], length: int, initial_state: States, cu_seqlens: Tensor | None
) -> None:
    if isinstance(segment, float):
        raise ValueError(f"{OP}: segment must be a whole number or a list of them, got {segment}")
    if isinstance(segment, int):
        if segment < 1:
            raise ValueError(f"{OP}: segment must be at least 1, got {segment}")
        return
    if cu_seqlens is not None:
        raise ValueError(f"{OP}: packed sequences take one segment length, got the list {list(segment)}")
    if sum(segment) != length or min(segment) < 1:
        raise ValueError(f"{OP}: segment lengths must be at least 1 and sum to T = {length}, got {list(segment)}")
    if isinstance(initial_state, MemoryCacheState) and initial_state.position:
        raise ValueError(f"{OP}: a list of segments starts at a segment's start, got position {initial_state.position}")


def _require_state(state: Any, q: Tensor, v: Tensor, width: int, segment: int | Sequence[int]) -> None:
    """Raise unless the state is one of this memory's; a packed sequence has one of its own, for a batch of 1."""
    if not isinstance(state, MemoryCacheState):
        raise ValueError(f"{OP}: initial_state must be one MemoryCacheState, got {type(state).__name__}")
    if isinstance(segment, int) and not 0 <= state.position < segment:
        raise ValueError(f"{OP}: initial_state must stand within a segment of {segment}, got position {state.position}")
    batch, memory, number = q.shape[0], (*q.shape[2:], v.shape[3]), state.cached.shape[1]
    require_shape(OP, "initial_state.current", state.current, (batch, *memory), "[B, H, K, V]")
    require_shape(OP, "initial_state.cached", state.cached, (batch, number, *memory), "[B, N, H, K, V]")
    require_shape(OP, "initial_state.pooled", state.pooled, (batch, number, q.shape[2], width), "[B, N, H, R]")
    require_shape(OP, "initial_state.running", state.running, (batch, q.shape[2], width), "[B, H, R]")


@explained_by(_plan)
def memory_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    segment: int | Sequence[int],
    variant: str = "gated",
    write: str = "carry",
    route_q: Tensor | None = None,
    route_k: Tensor | None = None,
    top_k: int = 2,
    scale: float | None = None,
    initial_state: States = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any]:
    """A linear memory and its cached past: o_t = w_t M_t^T q_t + sum over cached memories i of w_ti M_i^T q_t.

    At the end of every segment the memory M is cached. The score of a cached memory is <route_q_t, mean of route_k over
    its segment>, of the running one the same with the mean over its tokens up to t, so nothing looks ahead.

    Args:
        q, k, v, beta, g, scale, chunk, backend: as in `gated_linear_attention`, or with beta as in `delta_rule`, which
            run the memory.
        segment: tokens per segment, counted over calls; or the list of all segments' lengths (`logarithmic_segments`).
        variant: "residual" (all weights 1), "gated" (softmax of the scores), "soup" (the memories averaged with those
            weights, then read once; the same function here, where memories are linear), "sparse" (softmax over the
            running memory and the `top_k` best cached ones).
        write: "carry" (the memory goes on after being cached) or "restart" (every segment begins with an empty one; the
            segments then run side by side).
        route_q, route_k: [B, T, H, R], all variants but "residual".
        initial_state: as returned. cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1), read on the
            host; states are then one per sequence.

    Returns:
        o: outputs [B, T, H, V] in the dtype of `v`.
        final_state: `MemoryCacheState` (packed: a tuple of them); its tensors are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or kinds disagree, or the backend asked for cannot run.

    Cost: the op below, and 2 N K V operations per token and head to read N cached memories ("soup": as many, and T K V
        numbers kept for the backward); "sparse" multiplies masked weights too. States grow with T / segment.
    Source: Memory Caching, from notes on the paper. Differences: the running mean for the open segment is ours (the
        notes are silent); "sparse" always reads the running memory.

    Example:
        >>> x = torch.ones(1, 4, 1, 1)
        >>> o, state = memory_cache(x, x, x, segment=2, variant="residual", write="restart")
        >>> o.flatten().tolist(), state.cached.flatten().tolist()
        ([1.0, 2.0, 3.0, 4.0], [2.0, 2.0])
    """
    decision = _plan(
        q,
        k,
        v,
        beta,
        g,
        segment=segment,
        variant=variant,
        write=write,
        route_q=route_q,
        route_k=route_k,
        top_k=top_k,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk=chunk,
        backend=backend,
    )
    dtype = state_dtype(v.dtype)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    options = Options(base_call(decision, scale), variant, write, top_k, scale)
    route = [None if x is None else x.to(dtype) for x in (route_q, route_k)]
    tokens = [q, k, v, beta, g, *route]
    if cu_seqlens is None:
        state = _fresh(q, v, route[0], dtype) if initial_state is None else initial_state
        assert isinstance(state, MemoryCacheState)
        return _one(decision.backend, tokens, _cast(state, dtype), segment, options)
    spans = list(pairwise(cu_seqlens.tolist()))
    given: Any = [_fresh(q, v, route[0], dtype)] * len(spans) if initial_state is None else initial_state
    outs, states = [], []
    for (begin, end), start in zip(spans, given, strict=True):
        own, state = [x if x is None or x.dim() == 1 else x[:, begin:end] for x in tokens], _cast(start, dtype)
        if end > begin:
            out, state = _one(decision.backend, own, state, segment, options)
            outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), tuple(states)


def _fresh(q: Tensor, v: Tensor, route: Tensor | None, dtype: torch.dtype) -> MemoryCacheState:
    """Nothing written, nothing cached."""
    batch, heads, width = q.shape[0], q.shape[2], 0 if route is None else route.shape[3]
    memory = v.new_zeros(batch, *q.shape[2:], v.shape[3], dtype=dtype)
    pooled = v.new_zeros(batch, 0, heads, width, dtype=dtype)
    return MemoryCacheState(memory, memory[:, None][:, :0], pooled, pooled.new_zeros(batch, heads, width), 0)


def _cast(state: MemoryCacheState, dtype: torch.dtype) -> MemoryCacheState:
    current, cached, pooled, running = (x.to(dtype) for x in state[:4])
    return MemoryCacheState(current, cached, pooled, running, state.position)


@without_autocast
def _one(
    backend: str,
    tokens: list[Tensor | None],
    state: MemoryCacheState,
    segment: int | Sequence[int],
    options: Options,
) -> tuple[Tensor, MemoryCacheState]:
    """Sequences of one length."""
    *tokens, route_q, route_k = tokens
    v = tokens[2]
    assert v is not None
    if route_k is None:
        route_k = v.new_zeros(*v.shape[:3], 0, dtype=state.running.dtype)
    engine: Any = chunked.run
    if backend == "reference":
        engine = memory_cache_reference
    elif backend == "triton":
        from kernels.memory_cache import triton

        engine = triton.run
    segments = segments_of(segment, v.shape[1], state.position)
    out, final = engine(tokens, route_q, route_k, segments, state, options)
    return out.to(v.dtype), final
