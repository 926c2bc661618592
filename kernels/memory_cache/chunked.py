"""Cached memories by segments: the running memory by its own kernel, the reads as one matrix product per segment.

The weighted sum of reads over cached memories, sum_i w_i q M_i, is the product of [w_1 q, .., w_N q] with the memories
stacked along K. Masked weights are multiplied too: skipping them by gathering memories per token would put atomics
into the gradient.

Legend: B batch, T time, H heads, K/V key/value width, N cached memories, t tokens of a segment.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.common.fused import running_sum
from kernels.memory_cache.state import MemoryCacheState, Options, Segment, weights_of

# tokens whose averaged memories are formed at a time
SOUP_TOKENS = 32


def run(
    tokens: list[Tensor | None],
    route_q: Tensor | None,
    route_k: Tensor,
    segments: list[Segment],
    state: MemoryCacheState,
    options: Options,
) -> tuple[Tensor, MemoryCacheState]:
    """As `memory_cache_reference`; `options.base` also takes `cu_seqlens`."""
    q = tokens[0]
    assert q is not None
    runner = _carried if options.write == "carry" else _restarted
    outs, ends = runner(tokens, segments, state.current, options.base)
    _, cached, pooled, running, seen = state
    # cut once: the gradient of every slice by itself would be as long as the call
    lengths = [segment.end - segment.begin for segment in segments]
    queries, totals = q.split(lengths, 1), _totals(route_k, segments).split(lengths, 1)
    asks = None if route_q is None else route_q.split(lengths, 1)
    for n, segment in enumerate(segments):
        sums = totals[n] if n else running[:, None] + totals[n]
        count = seen + torch.arange(1, lengths[n] + 1, device=sums.device, dtype=sums.dtype)
        mean = sums / count[:, None, None]
        found = weights_of(None if asks is None else asks[n], mean, pooled, options.variant, options.top_k)
        query = queries[n].to(cached.dtype) * options.scale
        if found is not None:
            outs[n] = outs[n] * found[1]
        if cached.shape[1]:
            read = _soup if options.variant == "soup" else _weighted_reads
            outs[n] = outs[n] + read(query, cached, None if found is None else found[0])
        running, seen = sums[:, -1], seen + lengths[n]
        if segment.closes:
            cached = torch.cat([cached, ends[n][:, None]], dim=1)
            pooled = torch.cat([pooled, mean[:, -1:]], dim=1)
            running, seen = torch.zeros_like(running), 0
    current = ends[-1]
    if options.write == "restart" and segments[-1].closes:
        current = torch.zeros_like(current)
    return torch.cat(outs, dim=1), MemoryCacheState(current, cached, pooled, running, seen)


def _totals(route_k: Tensor, segments: list[Segment]) -> Tensor:
    """Sums of routing keys over each segment's tokens so far."""
    starts = torch.zeros(route_k.shape[:2], dtype=torch.bool, device=route_k.device)
    starts[:, [segment.begin for segment in segments]] = True
    return running_sum(route_k, starts)


def _carried(
    tokens: list[Tensor | None], segments: list[Segment], current: Tensor, base: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and last states of every segment, the memory going on from one to the next."""
    outs, ends = [], []
    lengths = [segment.end - segment.begin for segment in segments]
    cut: list[Any] = [[x] * len(lengths) if x is None or x.dim() == 1 else x.split(lengths, 1) for x in tokens]
    for own in zip(*cut, strict=True):
        out, current = base(*own, current)
        outs.append(out.to(current.dtype))
        ends.append(current)
    return outs, ends


def _restarted(
    tokens: list[Tensor | None], segments: list[Segment], current: Tensor, base: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same with every segment from nothing: all side by side, as packed sequences."""
    v = tokens[2]
    assert v is not None
    batch, length = v.shape[:2]
    offsets = [b * length + s.begin for b in range(batch) for s in segments] + [batch * length]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=v.device)
    packed: list[Any] = [x if x is None or x.dim() == 1 else x.flatten(0, 1)[None] for x in tokens]
    rest = current.new_zeros(batch, len(segments) - 1, *current.shape[1:])
    starts = torch.cat([current[:, None], rest], dim=1).flatten(0, 1)
    out, ends = base(*packed, starts, cu_seqlens=cu_seqlens)
    out = out.view(v.shape).to(current.dtype)
    lengths = [segment.end - segment.begin for segment in segments]
    return list(out.split(lengths, 1)), list(ends.view(batch, len(segments), *current.shape[1:]).unbind(1))


def _weighted_reads(query_BtHK: Tensor, cached_BNHKV: Tensor, weights_BtHN: Tensor | None) -> Tensor:
    """sum_i w_i q M_i."""
    if weights_BtHN is None:
        return torch.einsum("bthk,bhkv->bthv", query_BtHK, cached_BNHKV.sum(1))
    asked = (weights_BtHN[..., None] * query_BtHK[..., None, :]).flatten(3).transpose(1, 2)
    return (asked @ cached_BNHKV.transpose(1, 2).flatten(2, 3)).transpose(1, 2)


def _soup(query_BtHK: Tensor, cached_BNHKV: Tensor, weights_BtHN: Tensor | None) -> Tensor:
    """q (sum_i w_i M_i): the memories averaged, then read once."""
    assert weights_BtHN is not None
    outs = []
    for begin in range(0, query_BtHK.shape[1], SOUP_TOKENS):
        cut = slice(begin, begin + SOUP_TOKENS)
        mixed = torch.einsum("bthn,bnhkv->bthkv", weights_BtHN[:, cut], cached_BNHKV)
        outs.append((query_BtHK[:, cut][..., None, :] @ mixed)[..., 0, :])
    return torch.cat(outs, dim=1)
