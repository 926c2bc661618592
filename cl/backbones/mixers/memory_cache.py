"""Memory caching: a memory that keeps what it was at the end of every segment, and reads from all of them.

Shape legend: B rows, T tokens, D width, H heads, R routing width, N cached memories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cl.backbones import _cells
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision
from cl.backbones._state import State
from cl.backbones.mixers import _cached_linear, _cached_neural
from cl.backbones.mixers.linear_memory import LinearMemory
from cl.backbones.mixers.neural_memory import NeuralMemory
from cl.backbones.neural_rules.tnt import Tnt
from cl.core import UserError

READS = ("residual", "gated", "soup", "sparse")
KEEPS = ("carry", "restart")


class MemoryCache(Mixer):
    """o_t = w_t M_t(q_t) + sum over cached memories i of w_ti M_i(q_t).

    residual: all weights 1. gated: softmax of the scores r_ti = <W_u x_t, mean of W_r x over segment i>, the mean of
    the open segment over its tokens up to t. soup: the memories' weights averaged with those, then asked once.
    sparse: softmax over the running memory and the `top` best cached ones.

    Args:
        width: D.
        inner: a linear_memory whose rule is linear(normaliser=false), delta, gated_delta, kda, gla or retnet, or a
            plain neural_memory (any rule but tnt).
        read: residual, gated, soup or sparse; soup is gated for a linear memory.
        segment: tokens of a segment, counted from the document's start.
        keep: carry (the memory goes on after it was cached) or restart (each segment begins with an empty one).
        top: cached memories that sparse reads.
        route_width: R of a head's scores; None takes D / H.

    Raises:
        UserError: a value outside its range, or another mixer to wrap.

    Cost: the inner layer, 2 D H R multiply-adds a token for the scores, and N reads; the state grows by one memory
        every `segment` tokens. The soup of a neural memory forms its weights token by token.
    Source: Memory Caching (Behrouz et al., 2026), from notes on the paper: in the spirit of it. Differences: the
        running mean of the open segment is ours, and so are scores per head and a map of the tokens that are averaged.
    """

    lifetime = Lifetime(fast=("cache", "tail", "position"), resets=("cache", "tail"))
    examples = (
        "memory_cache(linear_memory(rule=delta), segment=4)",
        "memory_cache(linear_memory(rule=gla), segment=4, read=residual, keep=restart)",
        "memory_cache(linear_memory(rule=gated_delta), segment=3, read=sparse, top=1)",
        "memory_cache(linear_memory(rule=retnet, conv=0), segment=4, read=soup)",
        "memory_cache(neural_memory(rule=titans(chunk=2, expansion=2)), segment=4)",
        "memory_cache(neural_memory(rule=ttt_mlp(chunk=3, expansion=2)), segment=4, read=soup)",
        "memory_cache(neural_memory(rule=memora(chunk=2, depth=1)), segment=5, read=sparse, top=1, keep=restart)",
        "memory_cache(neural_memory(rule=atlas(chunk=2, window=2, degree=1)), segment=4, read=residual)",
    )

    def __init__(
        self,
        width: int,
        inner: Callable[[int], nn.Module],
        *,
        read: str = "gated",
        segment: int = 64,
        keep: str = "carry",
        top: int = 2,
        route_width: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("read", read, READS), ("keep", keep, KEEPS)):
            if value not in allowed:
                raise UserError(f"{name} of memory_cache is {value!r}; it must be one of {', '.join(allowed)}")
        require_width("segment", segment)
        require_width("top", top)
        if route_width is not None:
            require_width("route_width", route_width)
        layer = inner(width)
        self.read, self.segment, self.keep, self.top = read, segment, keep, top
        if isinstance(layer, LinearMemory):
            _cached_linear.require_cached_rule(layer.rule)
            num_heads = layer.num_heads
        elif isinstance(layer, NeuralMemory) and layer.layout == "plain" and not isinstance(layer.memory.rule, Tnt):
            num_heads = layer.memory.num_heads
        else:
            raise UserError(
                "memory_cache wraps a linear_memory or a plain neural_memory with another rule than tnt; it got a "
                f"{type(layer).__name__}"
            )
        self.inner, self.num_heads = layer, num_heads
        self.route_width = (
            0 if read == "residual" else max(1, width // num_heads) if route_width is None else route_width
        )
        if read != "residual":
            self.route_query = nn.Linear(width, num_heads * self.route_width, bias=False)
            self.route_key = nn.Linear(width, num_heads * self.route_width, bias=False)

    @property
    def out(self) -> nn.Linear:
        """The projection that writes into the residual stream."""
        return self.inner.out

    @property
    def _layer(self) -> Any:
        """What has the projections: a linear memory itself, the branch of a neural one."""
        return self.inner if isinstance(self.inner, LinearMemory) else self.inner.memory

    def init_state(self, num_rows: int) -> State:
        inner = self._layer.init_state(num_rows)
        if isinstance(self.inner, LinearMemory):
            cache = _cached_linear.init_cache(inner["memory"]["matrix"], self.route_width)
        else:
            cache = _cached_neural.init_cache(self._layer.rule, num_rows, self.fresh(0), self.route_width)
        return {"cache": cache, "tail": inner["tail"], "position": inner.get("position", cache["count"].new_zeros(()))}

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        tokens, tail = self._layer.tokens(x_BTD, state, reset)
        if self.read != "residual":
            routes = {"route_q": self.route_query(x_BTD), "route_k": self.route_key(x_BTD)}
            tokens |= {name: _cells.wide(r).unflatten(-1, (self.num_heads, -1)) for name, r in routes.items()}
        options: dict[str, Any] = {
            "segment": self.segment,
            "variant": self.read,
            "write": self.keep,
            "top_k": self.top,
        }
        with in_full_precision(x_BTD):
            if isinstance(self.inner, LinearMemory):
                if mode == "recurrent":
                    tokens = {name: _cells.wide(x) for name, x in tokens.items()}
                    options["backend"] = "reference"
                o, cache = _cached_linear.run_cache(self.inner.rule, tokens, state["cache"], reset, **options)
            else:
                given = _cached_neural.Options(**options)
                o, cache = _cached_neural.run_cache(self._layer.rule, tokens, state["cache"], reset, mode, given)
        left = {"cache": cache, "tail": tail, "position": state["position"] + x_BTD.shape[1]}
        if isinstance(self.inner, LinearMemory):
            return self.inner.finish(o, x_BTD), left
        return self.inner.finish(self._layer.finish(o, x_BTD), x_BTD), left
