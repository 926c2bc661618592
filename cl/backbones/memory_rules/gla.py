"""Gated linear attention: every key channel decays at its own, data-dependent rate.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, outer, read
from cl.core import UserError
from kernels.gated_linear_attention import gated_linear_attention


class Gla(Rule):
    """S = diag(alpha) S + k (x) v,  o = q S / sqrt(K),  alpha = sigmoid(W_2 W_1 x + b)^(1 / 16).

    Args:
        rank: of the gate's projection.
        temperature: the root that is taken of the sigmoid; larger forgets more slowly.

    Raises:
        UserError: a value outside its range.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023. Checked by
        numbers against naive_recurrent_gla of fla, which is the authors', and against the gate of its layer.
        Differences: none in the rule; that layer leaves out the short convolution and its SiLU unless asked.
    """

    row = Row(
        "S", "-<k S, v>", "diag(alpha) S, per key channel", "diag(alpha) S + k (x) v", "q S", "-", "Yang et al., 2023"
    )

    def __init__(
        self,
        width: int,
        num_heads: int,
        key_width: int,
        value_width: int,
        *,
        rank: int = 16,
        temperature: float = 16.0,
    ) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        require_width("rank", rank)
        if not temperature > 0:
            raise UserError(f"temperature of gla is {temperature!r}; it must be a number above 0")
        self.temperature = temperature
        self.retention = nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, num_heads * key_width, bias=True)
        )

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTHK

    def gates(self, x_BTD: Tensor) -> Gates:
        raw = self.retention(x_BTD)
        log_decay = F.logsigmoid(raw.to(torch.promote_types(torch.float32, raw.dtype))) / self.temperature
        return {"log_decay": log_decay.unflatten(-1, (self.num_heads, self.key_width))}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        matrix = gates["log_decay"].exp().unsqueeze(-1) * state["matrix"] + outer(k_BHK, v_BHV)
        return read(q_BHK, matrix) * self.key_width**-0.5, {"matrix": matrix}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        o_BTHV, end = gated_linear_attention(
            q_BTHK, k_BTHK, v_BTHV, gates["log_decay"], initial_state=state["matrix"], **how
        )
        return o_BTHV, {"matrix": end}
