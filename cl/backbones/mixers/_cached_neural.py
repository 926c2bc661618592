"""Cached neural memories: the weights at every segment's end, read beside the running ones, in torch.

Shape legend: B rows, T tokens, N cached memories, H heads, F features, K width of a head, R routing width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.backbones._state import State, mapped, where_rows
from cl.backbones._windows import pieces
from cl.backbones.neural_rules._parts import ask, in_order
from cl.backbones.neural_rules._rule import Gates, NeuralRule


@dataclass(frozen=True)
class Options:
    """What does not change along a call, as in `kernels.memory_cache`."""

    segment: int
    variant: str
    write: str
    top_k: int


def init_cache(rule: NeuralRule, num_rows: int, like: Tensor, route_width: int) -> State:
    """Nothing written, nothing cached."""
    memory = rule.init_state(num_rows)
    count_B = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
    return {
        "current": memory,
        "cached": mapped(lambda w: w.detach().unsqueeze(1)[:, :0], memory["weights"]),
        "pooled": like.new_zeros(num_rows, 0, rule.num_heads, route_width),
        "running": like.new_zeros(num_rows, rule.num_heads, route_width),
        "place": count_B,
        "count": count_B,
    }


def run_cache(
    rule: NeuralRule, tokens: Gates, cache: State, reset: Tensor | None, mode: str, options: Options
) -> tuple[Tensor, State]:
    """Outputs (B, T, H, K) and the caches after the last token; `tokens` as for linear memories."""
    num_rows, num_tokens = tokens["q"].shape[:2]
    fresh = init_cache(rule, num_rows, cache["running"], cache["running"].shape[-1])
    fresh_open = {name: fresh[name] for name in ("current", "running", "place", "count")}
    outs = []
    for begin, end in pieces(num_tokens, cache["place"], reset, options.segment):
        if reset is not None:
            open_ = where_rows(reset[:, begin], fresh_open, {name: cache[name] for name in fresh_open})
            cache = cache | open_
        piece = {name: x[:, begin:end] for name, x in tokens.items()}
        o, cache = _piece(rule, piece, cache, mode, options)
        outs.append(o)
        is_closed_B = cache["place"] == options.segment
        if is_closed_B.any():
            cache = _closed(cache, fresh, is_closed_B, options)
    return torch.cat(outs, 1), cache


def _piece(rule: NeuralRule, tokens: Gates, cache: State, mode: str, options: Options) -> tuple[Tensor, State]:
    """Tokens of one segment in every row."""
    gates = {name: x for name, x in tokens.items() if name not in ("q", "k", "v", "route_q", "route_k")}
    q, num_tokens = tokens["q"], tokens["q"].shape[1]
    weights = None
    left = {"place": cache["place"] + num_tokens}
    if options.variant != "residual":
        running = cache["running"].unsqueeze(1) + tokens["route_k"].cumsum(1)
        tokens_read = cache["place"][:, None] + torch.arange(1, num_tokens + 1, device=q.device)
        weights = _weights(tokens["route_q"], running / tokens_read[..., None, None], cache, options)
        left["running"] = running[:, -1]
    if options.variant == "soup":
        outs, current = [], cache["current"]
        for t in range(num_tokens):
            at = slice(t, t + 1)
            own = {name: x[:, at] for name, x in gates.items()}
            _, current = rule.run(current, q[:, at], tokens["k"][:, at], tokens["v"][:, at], own, None, mode)
            assert weights is not None
            outs.append(_soup(rule, q[:, at], current, cache, (weights[0][:, at], weights[1][:, at])))
        return torch.cat(outs, 1), cache | left | {"current": current}
    o, current = rule.run(cache["current"], q, tokens["k"], tokens["v"], gates, None, mode)
    exists_BN = _exists(cache)
    if weights is None:
        cached_BTHN = exists_BN[:, None, None].to(o.dtype).expand(*o.shape[:3], -1)
        own_BTH1 = torch.ones_like(o[..., :1])
    else:
        cached_BTHN, own_BTH1 = weights
    o = own_BTH1 * o
    for n in range(exists_BN.shape[1]):
        old = mapped(lambda w, n=n: w[:, n], cache["cached"])
        o = o + cached_BTHN[..., n : n + 1] * rule.ask(old, q)
    return o, cache | left | {"current": current}


def _exists(cache: State) -> Tensor:
    """(B, N) whether a cached memory is one, and no filling."""
    places_N = torch.arange(cache["pooled"].shape[1], device=cache["count"].device)
    return places_N < cache["count"][:, None]


def _weights(route_q: Tensor, mean: Tensor, cache: State, options: Options) -> tuple[Tensor, Tensor]:
    """Of every cached memory (B, T, H, N) and of the running one (B, T, H, 1)."""
    own = (route_q * mean).sum(-1, keepdim=True)
    score = torch.einsum("bthr,bnhr->bthn", route_q, cache["pooled"])
    score = score.masked_fill(~_exists(cache)[:, None, None], -torch.inf)
    if options.variant == "sparse" and score.shape[-1] > options.top_k:
        best = score.topk(options.top_k, -1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        score = score.masked_fill(~chosen, -torch.inf)
    both = torch.cat((score, own), -1).softmax(-1)
    return both[..., :-1], both[..., -1:]


def _soup(rule: NeuralRule, q_B1HF: Tensor, current: State, cache: State, weights: tuple[Tensor, Tensor]) -> Tensor:
    """What the average of all memories' weights answers: (B, 1, H, K)."""
    cached_BHN, own_BH = weights[0][:, 0], weights[1][:, 0, :, 0]
    now, cached = (rule.recipe.weights(in_order(each)) for each in (current["weights"], cache["cached"]))
    mixed = []
    for old, w in zip(cached, now, strict=True):
        mixed.append(own_BH[..., None, None] * w + torch.einsum("bhn,bnhio->bhio", cached_BHN, old))
    return ask(mixed, q_B1HF.transpose(1, 2), rule.norm).transpose(1, 2)


def _closed(cache: State, fresh: State, is_closed_B: Tensor, options: Options) -> State:
    """The caches after the segments of some rows have ended."""
    count = cache["count"]
    missing = int((count + is_closed_B).max()) - cache["pooled"].shape[1]
    slots = torch.arange(cache["pooled"].shape[1] + max(0, missing), device=count.device)
    is_here_BN = (slots == count[:, None]) & is_closed_B[:, None]

    def added(old_BN: Tensor, new_B: Tensor) -> Tensor:
        old_BN = F.pad(old_BN, (*[0, 0] * (old_BN.dim() - 2), 0, max(0, missing)))
        return torch.where(is_here_BN.view(*is_here_BN.shape, *[1] * (new_B.dim() - 1)), new_B.unsqueeze(1), old_BN)

    pooled = added(cache["pooled"], cache["running"] / options.segment)
    cached = mapped(added, cache["cached"], cache["current"]["weights"])
    cleared = {name: fresh[name] for name in ("running", "place", *["current"] * (options.write == "restart"))}
    open_ = where_rows(is_closed_B, cleared, {name: cache[name] for name in cleared})
    return cache | {"pooled": pooled, "cached": cached, "count": count + is_closed_B} | open_
