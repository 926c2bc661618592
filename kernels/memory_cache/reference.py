"""Token loops of cached and routed memories: every memory formed, every read written out. The definitions."""

from typing import Any

import torch
from torch import Tensor

from kernels.memory_cache.state import MemoryCacheState, Options, Segment, weights_of


def _at(x: Tensor | None, t: int) -> Tensor | None:
    return x if x is None or x.dim() == 1 else x[:, t : t + 1]


def memory_cache_reference(
    tokens: list[Tensor | None],
    route_q: Tensor | None,
    route_k: Tensor,
    segments: list[Segment],
    state: MemoryCacheState,
    options: Options,
) -> tuple[Tensor, MemoryCacheState]:
    """o_t = sum over memories i of weight_ti M_i^T q_t scale, the running memory at token t among them.

    `tokens` are q, k, v, beta, g; `options.base` is the token loop of the running memory.
    """
    q = tokens[0]
    assert q is not None
    current, cached, pooled, running, seen = state
    outs: list[Any] = []
    for segment in segments:
        for t in range(segment.begin, segment.end):
            _, current = options.base(*(_at(x, t) for x in tokens), current)
            running, seen = running + route_k[:, t], seen + 1
            query = q[:, t].to(current.dtype) * options.scale
            memories = [*cached.unbind(1), current]
            mean = (running / seen)[:, None]
            found = weights_of(_at(route_q, t), mean, pooled, options.variant, options.top_k)
            ones = [1.0] * len(memories)
            weights: Any = ones if found is None else [w[:, 0, :, None] for w in torch.cat(found, dim=-1).unbind(-1)]
            if options.variant == "soup":
                mixed: Any = sum(w[..., None] * m for w, m in zip(weights, memories, strict=True))
                memories = [mixed]
                weights = [1.0]
            outs.append(sum(w * (query[..., None, :] @ m)[..., 0, :] for w, m in zip(weights, memories, strict=True)))
        if segment.closes:
            cached = torch.cat([cached, current[:, None]], dim=1)
            pooled = torch.cat([pooled, (running / seen)[:, None]], dim=1)
            running, seen = torch.zeros_like(running), 0
            if options.write == "restart":
                current = torch.zeros_like(current)
    return torch.stack(outs, dim=1), MemoryCacheState(current, cached, pooled, running, seen)


def routed_memory_reference(
    tokens: list[Tensor | None], chosen: Tensor, weights: Tensor, state: Tensor, base: Any, per_memory: bool
) -> tuple[Tensor, Tensor]:
    """Every token is written to its chosen memories only, and read from them.

    `chosen` and `weights` [T, k] of one sequence; tokens [1, T, ...] (keys, values and gates [1, T, E, ...] if
    `per_memory`); state [E, H, K, V].
    """
    memories, outs = list(state[:, None].unbind(0)), []
    # queries and constant gates belong to no memory
    owned = [per_memory and i > 0 and x is not None and x.dim() > 1 for i, x in enumerate(tokens)]
    for t in range(chosen.shape[0]):
        total: Any = 0
        for j, e in enumerate(chosen[t].tolist()):
            own = [x[:, :, e] if x is not None and mine else x for x, mine in zip(tokens, owned, strict=True)]
            out, memories[e] = base(*(_at(x, t) for x in own), memories[e])
            total = total + weights[t, j] * out
        outs.append(total)
    return torch.cat(outs, dim=1), torch.cat(memories)
