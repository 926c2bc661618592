"""The state of cached memories, the segments of a call, and the weights of the memories at a token.

Legend: B batch, T time, H heads, K/V key/value width, R routing width, N cached memories.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

VARIANTS = ("residual", "gated", "soup", "sparse")
WRITES = ("carry", "restart")


class MemoryCacheState(NamedTuple):
    """The running memory [B, H, K, V]; those cached so far [B, N, H, K, V] with the means of their segments' routing
    keys [B, N, H, R]; the sum of routing keys over the unfinished segment [B, H, R] and its tokens read so far.
    """

    current: Tensor
    cached: Tensor
    pooled: Tensor
    running: Tensor
    position: int


class Options(NamedTuple):
    """What does not change along a call; `base` runs one stretch: (q, k, v, beta, g, state) -> output, state."""

    base: Any
    variant: str
    write: str
    top_k: int
    scale: float


class Segment(NamedTuple):
    """Tokens begin .. end of the call; `closes` if the segment ends with them and its memory is cached."""

    begin: int
    end: int
    closes: bool


def logarithmic_segments(length: int) -> list[int]:
    """Lengths of segments, each a power of two, the longest first: as few caches as `length` has ones in binary.

    Example:
        >>> logarithmic_segments(13)
        [8, 4, 1]
    """
    return [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]


def segments_of(segment: int | Sequence[int], length: int, position: int) -> list[Segment]:
    """The segments of a call of `length` tokens, the first of which may have begun before it."""
    if isinstance(segment, int):
        ends = [*range(segment - position, length, segment), length]
        closes = [(end + position) % segment == 0 for end in ends]
    else:
        ends = [sum(segment[: i + 1]) for i in range(len(segment))]
        closes = [True] * len(ends)
    begins = [0, *ends[:-1]]
    return [Segment(b, e, c) for b, e, c in zip(begins, ends, closes, strict=True)]


def weights_of(
    route_q_BtHR: Tensor | None, mean_BtHR: Tensor, pooled_BNHR: Tensor, variant: str, top_k: int
) -> tuple[Tensor, Tensor] | None:
    """Weight of every cached memory [B, t, H, N] and of the running one [B, t, H, 1]; None where all weigh 1."""
    if variant == "residual":
        return None
    assert route_q_BtHR is not None
    own = (route_q_BtHR * mean_BtHR).sum(-1, keepdim=True)
    cached = torch.einsum("bthr,bnhr->bthn", route_q_BtHR, pooled_BNHR)
    if variant == "sparse" and cached.shape[-1] > top_k:
        best = cached.topk(top_k, dim=-1).indices
        chosen = torch.zeros_like(cached, dtype=torch.bool).scatter(-1, best, True)
        cached = cached.masked_fill(~chosen, -torch.inf)
    both = torch.cat([cached, own], dim=-1).softmax(-1)
    return both[..., :-1], both[..., -1:]
