"""A neural memory with its projections: what all layouts of neural_memory share.

Shape legend: B rows, T tokens, D width, H heads, K width of a head, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._mixer import in_full_precision
from cl.backbones._norm import RMSNorm
from cl.backbones._spec import Spec, build, parse_one
from cl.backbones._state import State, where_rows
from cl.backbones.mixers._convolution import ShortConvolution
from cl.backbones.neural_rules._rule import NeuralRule


class NeuralBranch(nn.Module):
    """q, k, v = silu(conv(W x));  o = norm(rule(q, k, v, gates(x))), head by head."""

    def __init__(self, width: int, num_heads: int, rule: str | Spec, conv: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convolution = ShortConvolution(3 * width, conv)
        spec = rule if isinstance(rule, Spec) else parse_one(rule, "rule of neural_memory")
        shape = {"num_heads": num_heads, "head_width": width // num_heads}
        self.rule: NeuralRule = build(spec, "neural_rules", "rule of neural_memory", width, shape)  # type: ignore[assignment]
        self.norm = RMSNorm(width // num_heads, eps=1e-6)

    def init_state(self, num_rows: int) -> State:
        rule = self.rule.init_state(num_rows)
        like = self.query.weight
        dtype = torch.promote_types(torch.float32, like.dtype)
        tail = torch.zeros(num_rows, self.convolution.num_before, 3 * like.shape[0], dtype=dtype, device=like.device)
        return {"rule": rule, "tail": tail}

    def forward(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        """What the memory answers to every token (B, T, D), and the state after the last one."""
        gates, tail = self.tokens(x_BTD, state, reset)
        q, k, v = (gates.pop(name) for name in ("q", "k", "v"))
        o_BTHK, rule = self.rule.run(state["rule"], q, k, v, gates, reset, mode)
        return self.finish(o_BTHK, x_BTD), {"rule": rule, "tail": tail}

    def tokens(self, x_BTD: Tensor, state: State, reset: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """q, k, v as the rule takes them and its gates (B, T, ...), and the tail of the convolution."""
        projected = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        qkv, tail = self.convolution.parts(projected, state["tail"], reset)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)) for each in qkv)
        with in_full_precision(x_BTD):
            q, k = self.rule.features(q), self.rule.features(k)
        return {"q": q, "k": k, "v": v, **self.rule.gates(x_BTD)}, tail

    def finish(self, o_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        """(B, T, D), each head normed."""
        return self.norm(o_BTHK).flatten(2).to(x_BTD.dtype)

    def recall(self, x_BTD: Tensor, state: State) -> Tensor:
        """What the memory answered at the start of its open chunk; nothing is written."""
        rule = state["rule"]
        start = where_rows(rule["position"] == 0, rule["weights"], rule["start"])
        q = self.query(x_BTD).unflatten(-1, (self.num_heads, -1))
        with in_full_precision(x_BTD):
            o_BTHK = self.rule.ask(start, self.rule.features(q))
        return self.finish(o_BTHK, x_BTD)
