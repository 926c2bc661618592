"""Artificial hippocampus: attention over a window, and a memory of what has left it.

Shape legend: B rows, T tokens, D width, H heads, K width of a head, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import ages
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision
from cl.backbones._norm import RMSNorm
from cl.backbones._spec import Spec, build_rule
from cl.backbones._state import Packing, State, where_rows
from cl.backbones.memory_rules._rule import Rule
from cl.backbones.mixers.attention import Attention
from kernels.common.fused import gated


class Hippocampus(Mixer):
    """y_t = attention(x_{t-W+1} .. x_t) + W_o (norm(o_t) * silu(W_g x_t));  S, o_t = rule(S, q_t, k_u, v_u), u = t - W.

    Tokens are written into the memory when they leave the window: short documents are read by attention alone, long
    ones by attention over the last W tokens and a state of fixed size for all before.

    Args:
        width: D, a multiple of twice `num_heads`.
        num_heads: H of the attention and of the memory, which share their queries, keys and values.
        window: W, tokens that attention sees.
        rule: of the memory, a file in `cl/backbones/memory_rules/`.
        rope_base: of the attention's rotary angles, None for none; the memory sees queries and keys without them.

    Raises:
        UserError: a value outside its range.

    Cost: 4 D^2 + 2 W D multiply-adds a token for attention, 2 D^2 and the rule's for the memory (keys and values that
        leave in a later piece are computed a second time); the state holds W D and H K^2 numbers a row besides
        attention's.
    Source: Artificial Hippocampus Networks (ByteDance Seed, 2025), from notes on the code. Differences: trained with
        the network, not distilled into a frozen one; the memory has an output map of its own.
    """

    lifetime = Lifetime(fast=("attention", "memory", "tail", "age"))
    examples = (
        "hippocampus(window=3)",
        "hippocampus(window=1, rule=linear)",
        "hippocampus(window=4, rule=mamba2)",
        "hippocampus(window=3, rule=delta)",
    )

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        window: int = 64,
        rule: str | Spec = "gated_delta",
        rope_base: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads=num_heads, window=window, rope_base=rope_base)
        self.num_heads, self.head_width, self.window = num_heads, width // num_heads, window
        self.rule: Rule = build_rule(rule, width, num_heads, self.head_width, self.head_width)
        self.gate, self.norm = nn.Linear(width, width, bias=False), RMSNorm(self.head_width, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        width = self.num_heads * self.head_width
        return {
            "attention": self.attention.init_state(num_rows),
            "memory": self._fresh_memory(num_rows),
            "tail": self.fresh(num_rows, self.window, width),
            "age": self.fresh(num_rows),
        }

    def _fresh_memory(self, num_rows: int) -> State:
        return self.rule.init_state(self.fresh(num_rows, self.num_heads, self.head_width, self.head_width))

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        num_tokens = x_BTD.shape[1]
        tail_BWD, age_BT = state["tail"].to(x_BTD.dtype), ages(num_tokens, reset, state["age"])
        both = torch.cat((tail_BWD, x_BTD), 1)
        leaving_BTD = both[:, :num_tokens]
        layer, heads = self.attention, (self.num_heads, self.head_width)
        q_BTD, k_BTD, v_BTD = layer.query(x_BTD), layer.key(x_BTD), layer.value(x_BTD)
        seen_BTD, attention = layer.attend(q_BTD, k_BTD, v_BTD, state["attention"], reset)
        # of what leaves, only the tokens that came in earlier pieces were not projected above
        before_BPD, num_own = tail_BWD[:, :num_tokens], max(0, num_tokens - self.window)
        k_BTD = torch.cat((layer.key(before_BPD), k_BTD[:, :num_own]), 1)
        v_BTD = torch.cat((layer.value(before_BPD), v_BTD[:, :num_own]), 1)
        q, k, v = (each.unflatten(-1, heads) for each in (q_BTD, k_BTD, v_BTD))
        q, k = self.rule.prepare(q, k, int(state["attention"]["position"]))
        tokens = {"q": q, "k": k, "v": v, **self.rule.gates(leaving_BTD)}
        with in_full_precision(x_BTD):
            o_BTHK, memory = (self._step if mode == "recurrent" else self._chunk)(tokens, state["memory"], age_BT)
        # the first tokens of a document have nobody to push out of the window
        is_written = (age_BT > self.window)[..., None, None]
        o_BTHK = self.norm(torch.where(is_written, o_BTHK.to(self.norm.weight.dtype), 0))
        recalled_BTD = gated(self.gate(x_BTD), o_BTHK.flatten(2).to(x_BTD.dtype))
        left = {
            "attention": attention,
            "memory": memory,
            "tail": both[:, num_tokens:].to(state["tail"].dtype),
            "age": age_BT[:, -1],
        }
        return seen_BTD + self.out(recalled_BTD), left

    def _begins(self, age_BT: Tensor) -> Tensor:
        """Where the memory is empty: where a document starts, and where its first token leaves the window."""
        return (age_BT == 1) | (age_BT == self.window + 1)

    def _step(self, tokens: dict[str, Tensor], memory: State, age_BT: Tensor) -> tuple[Tensor, State]:
        memory = where_rows(self._begins(age_BT)[:, 0], self._fresh_memory(age_BT.shape[0]), memory)
        wide = self.fresh(0).dtype
        at = {name: each[:, 0].to(wide) for name, each in tokens.items()}
        o_BHK, memory = self.rule.step(memory, at.pop("q"), at.pop("k"), at.pop("v"), at)
        return o_BHK.unsqueeze(1), memory

    def _chunk(self, tokens: dict[str, Tensor], memory: State, age_BT: Tensor) -> tuple[Tensor, State]:
        # what is written before the first token leaves is of nobody; a document of its own keeps it apart
        packing = Packing.of(self._begins(age_BT))
        begun = packing.start(memory, self._fresh_memory(age_BT.shape[0]))
        flat = {name: packing.tokens(each) for name, each in tokens.items()}
        q, k, v = (flat.pop(name) for name in ("q", "k", "v"))
        o, after = self.rule.chunk(begun, q, k, v, flat, cu_seqlens=packing.cu_seqlens)
        return packing.rows(o), packing.end(after)
