"""A layer with a matrix memory per head, written and read by one of the rules in `cl/backbones/memory_rules/`.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width of a head, C = H (2 K + V) channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision
from cl.backbones._norm import RMSNorm
from cl.backbones._spec import Spec, build_rule
from cl.backbones._state import Packing, State, where_rows
from cl.backbones.memory_rules._rule import Rule
from cl.backbones.mixers._convolution import ShortConvolution
from cl.core import UserError
from kernels.common.fused import gated


class LinearMemory(Mixer):
    """q, k, v = silu(conv(W x));  S, o = rule(S, q, k, v, gates(x));  y = W_out (norm(o) * silu(W_gate x)).

    Args:
        width: D.
        num_heads: H.
        rule: name of a file in `cl/backbones/memory_rules/`, with options if it has some: delta(negative=true).
        key_width, value_width: K and V of a head; None takes D / H.
        conv: tokens that the short convolution of q, k and v sees; 0 leaves it out.
        gate: multiply the output by silu(W_gate x).
        chunk: tokens that a kernel handles at once, a power of two; None takes the kernel's own. Changes rounding only.

    Raises:
        UserError: a value outside its range.

    Cost: D (2 H K + 3 H V) multiply-adds a token for the projections (2 H V without the gate), the rule's gates, and
        2 to 4 H K V for the memory (7 where it is complex); the state holds H K V + (conv - 1) H (2 K + V) numbers a
        row, and the rule's own.
    Source: the layer that Gated DeltaNet (Yang et al., 2024) and flash-linear-attention have in common.
    Differences: one layer for all rules, so that they differ in their rule only; see the rules' own files.
    """

    lifetime = Lifetime(fast=("memory", "tail", "position"), resets=("memory", "tail"))
    examples = (
        "linear_memory(rule=linear)",
        "linear_memory(rule=linear(normaliser=false), conv=0, gate=false)",
        "linear_memory(rule=retnet)",
        "linear_memory(rule=gla)",
        "linear_memory(rule=mamba2)",
        "linear_memory(rule=mlstm)",
        "linear_memory(rule=delta(negative=true), key_width=4, value_width=6)",
        "linear_memory(rule=gated_delta, chunk=4)",
        "linear_memory(rule=kda)",
        "linear_memory(rule=gateloop)",
        "linear_memory(rule=longhorn)",
        "linear_memory(rule=longhorn(diagonal=false))",
    )

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        rule: str | Spec = "gated_delta",
        key_width: int | None = None,
        value_width: int | None = None,
        conv: int = 4,
        gate: bool = True,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.chunk = num_heads, chunk
        self.key_width = head_width(width, num_heads, key_width, "key_width")
        self.value_width = head_width(width, num_heads, value_width, "value_width")
        if not isinstance(conv, int) or isinstance(conv, bool) or conv < 0:
            raise UserError(f"conv of linear_memory is {conv!r}; it must be an integer of at least 0")
        require_chunk("linear_memory", chunk)
        keys, values = num_heads * self.key_width, num_heads * self.value_width
        self.query, self.key = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.convolution = ShortConvolution(2 * keys + values, conv)
        self.rule: Rule = build_rule(rule, width, num_heads, self.key_width, self.value_width)
        self.gate = nn.Linear(width, values, bias=False) if gate else None
        self.norm = RMSNorm(self.value_width, eps=1e-6)
        self.out = nn.Linear(values, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        zeros = self.fresh(num_rows, self.num_heads, self.key_width, self.value_width)
        channels = self.convolution.channels
        return {
            "memory": self.rule.init_state(zeros),
            "tail": self.fresh(num_rows, self.convolution.num_before, channels),
            "position": torch.tensor(0),
        }

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        tokens, tail = self.tokens(x_BTD, state, reset)
        with in_full_precision(x_BTD):
            o_BTHV, memory = (self._step if mode == "recurrent" else self._chunk)(tokens, state["memory"], reset)
        left = {"memory": memory, "tail": tail, "position": state["position"] + x_BTD.shape[1]}
        return self.finish(o_BTHV, x_BTD), left

    def tokens(self, x_BTD: Tensor, state: State, reset: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """q, k, v as the rule takes them and its gates (B, T, ...), and the tail of the convolution."""
        projected = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        qkv, tail = self.convolution.parts(projected, state["tail"], reset)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)) for each in qkv)
        q, k = self.rule.prepare(q, k, int(state["position"]))
        return {"q": q, "k": k, "v": v, **self.rule.gates(x_BTD)}, tail

    def finish(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """What the layer gives, from what the memory answered."""
        o_BTHV = self.norm(o_BTHV.to(self.norm.weight.dtype))
        if self.gate is not None:
            o_BTHV = gated(self.gate(x_BTD).view_as(o_BTHV), o_BTHV)
        y_BTD: Tensor = self.out(o_BTHV.flatten(2).to(x_BTD.dtype))
        return y_BTD

    def _step(self, tokens: dict[str, Tensor], memory: State, reset: Tensor | None) -> tuple[Tensor, State]:
        if reset is not None:
            memory = where_rows(reset[:, 0], self._fresh_memory(reset.shape[0]), memory)
        wide = self.fresh(0).dtype
        q, k, v, gates = _split({name: each[:, 0].to(wide) for name, each in tokens.items()})
        o_BHV, memory = self.rule.step(memory, q, k, v, gates)
        return o_BHV.unsqueeze(1), memory

    def _chunk(self, tokens: dict[str, Tensor], memory: State, reset: Tensor | None) -> tuple[Tensor, State]:
        if reset is None:
            q, k, v, gates = _split(tokens)
            return self.rule.chunk(memory, q, k, v, gates, chunk=self.chunk)
        packing = Packing.of(reset)
        memory = packing.start(memory, self._fresh_memory(reset.shape[0]))
        q, k, v, gates = _split({name: packing.tokens(each) for name, each in tokens.items()})
        o, memory = self.rule.chunk(memory, q, k, v, gates, cu_seqlens=packing.cu_seqlens, chunk=self.chunk)
        return packing.rows(o), packing.end(memory)

    def _fresh_memory(self, num_rows: int) -> State:
        return self.rule.init_state(self.fresh(num_rows, self.num_heads, self.key_width, self.value_width))


def _split(tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k, v, and the gates."""
    gates = {name: each for name, each in tokens.items() if name not in ("q", "k", "v")}
    return tokens["q"], tokens["k"], tokens["v"], gates


def require_chunk(mixer: str, chunk: Any) -> None:
    """Raise `UserError` unless it is a chunk that the kernels take, or None."""
    is_count = isinstance(chunk, int) and not isinstance(chunk, bool) and chunk > 0
    if chunk is not None and not (is_count and chunk & (chunk - 1) == 0):
        raise UserError(f"chunk of {mixer} is {chunk!r}; it must be a power of two, or none")


def head_width(width: int, num_heads: int, given: Any, name: str) -> int:
    """Width of a head: as given, or D / H.

    Raises:
        UserError: D is no multiple of H, or a value below 1.
    """
    require_width("num_heads", num_heads)
    if given is not None:
        require_width(name, given)
        return int(given)
    if width % num_heads:
        raise UserError(f"backbone.width is {width} for backbone.num_heads={num_heads}; a multiple is needed")
    return width // num_heads
