"""Cached linear memories as `kernels.memory_cache` keeps them, for rows whose caches differ in number.

Shape legend: B rows, T tokens, S documents, N cached memories, H heads, K key width, V value width, R routing width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.backbones._state import Packing, State
from cl.backbones.memory_rules._rule import Rule
from cl.backbones.memory_rules.delta import Delta
from cl.backbones.memory_rules.gated_delta import GatedDelta
from cl.backbones.memory_rules.gla import Gla
from cl.backbones.memory_rules.kda import Kda
from cl.backbones.memory_rules.linear import Linear
from cl.backbones.memory_rules.retnet import Retnet
from cl.core import UserError
from kernels.memory_cache import MemoryCacheState, memory_cache

SCALES: dict[type[Rule], float | None] = {Linear: 1.0, Delta: 1.0, GatedDelta: 1.0, Kda: 1.0, Gla: None, Retnet: None}
"""Rules whose answer is q S and whose write the kernel has, and what it multiplies q by (None: 1 / sqrt(K))."""


def require_cached_rule(rule: Rule) -> None:
    """Raise `UserError` unless the rule's memory is one matrix that answers q S."""
    if type(rule) not in SCALES or (isinstance(rule, Linear) and rule.has_normaliser):
        names = ", ".join("linear(normaliser=false)" if r is Linear else _word(r) for r in SCALES)
        raise UserError(f"memory_cache wraps a linear_memory with one of the rules {names}; it got {_word(type(rule))}")


def _word(rule: type) -> str:
    return "gated_delta" if rule is GatedDelta else rule.__name__.lower()


def init_cache(zeros_BHKV: Tensor, route_width: int) -> State:
    """Nothing written, nothing cached."""
    num_rows, num_heads = zeros_BHKV.shape[:2]
    count_B = torch.zeros(num_rows, dtype=torch.int64, device=zeros_BHKV.device)
    return {
        "current": zeros_BHKV,
        "cached": zeros_BHKV.unsqueeze(1)[:, :0],
        "pooled": zeros_BHKV.new_zeros(num_rows, 0, num_heads, route_width),
        "running": zeros_BHKV.new_zeros(num_rows, num_heads, route_width),
        "place": count_B,
        "count": count_B,
    }


def run_cache(
    rule: Rule, tokens: dict[str, Tensor], cache: State, reset: Tensor | None, **options: Any
) -> tuple[Tensor, State]:
    """Outputs (B, T, H, V) and the caches after the last token.

    Args:
        tokens: q, k, v, the rule's gates, and route_q, route_k where there is routing.
        options: of the kernel.
    """
    given = [tokens["q"], tokens["k"], tokens["v"], tokens.get("strength"), tokens.get("log_decay")]
    options |= {"scale": SCALES[type(rule)]}
    routes = {name: tokens.get(name) for name in ("route_q", "route_k")}
    counts, places = cache["count"].tolist(), cache["place"].tolist()
    if reset is None and len(set(counts)) == len(set(places)) == 1:
        begun = _taken(cache, slice(None), counts[0], places[0])
        o, after = memory_cache(*given, **routes, initial_state=begun, **options)
        return o, _joined([after], [len(counts)])
    packing = Packing.of(torch.zeros(o_shape(given), dtype=torch.bool) if reset is None else reset)
    fresh = init_cache(torch.zeros_like(cache["current"][:1]), cache["running"].shape[-1])
    starts = [
        _taken(fresh, slice(0, 1), 0, 0) if is_new else _taken(cache, slice(row, row + 1), counts[row], places[row])
        for row, is_new in zip(packing.row.tolist(), packing.is_new.tolist(), strict=True)
    ]
    # a decay per head alone is no token's
    flat = [x if x is None or x.dim() == 1 else packing.tokens(x) for x in given]
    routes = {name: None if x is None else packing.tokens(x) for name, x in routes.items()}
    o, after = memory_cache(*flat, **routes, initial_state=starts, cu_seqlens=packing.cu_seqlens, **options)
    ends = [after[s] for s in packing.last.tolist()]
    return packing.rows(o), _joined(ends, [1] * len(ends))


def o_shape(given: list[Any]) -> tuple[int, int]:
    """(B, T)."""
    return given[0].shape[0], given[0].shape[1]


def _taken(cache: State, rows: slice, count: int, place: int) -> MemoryCacheState:
    """Some rows' caches, as the kernel takes them."""
    return MemoryCacheState(
        cache["current"][rows],
        cache["cached"][rows, :count],
        cache["pooled"][rows, :count],
        cache["running"][rows],
        place,
    )


def _joined(states: list[MemoryCacheState], num_rows: list[int]) -> State:
    """Caches of all rows, those with fewer filled up with zeros."""
    counts = [state.cached.shape[1] for state in states]
    device = states[0].current.device

    def filled(x_BN: Tensor) -> Tensor:
        return F.pad(x_BN, (*[0, 0] * (x_BN.dim() - 2), 0, max(counts) - x_BN.shape[1]))

    def every(values: list[int]) -> Tensor:
        rows = torch.tensor(num_rows)
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(rows).to(device)

    return {
        "current": torch.cat([state.current for state in states]),
        "cached": torch.cat([filled(state.cached) for state in states]),
        "pooled": torch.cat([filled(state.pooled) for state in states]),
        "running": torch.cat([state.running for state in states]),
        "place": every([state.position for state in states]),
        "count": every(counts),
    }
