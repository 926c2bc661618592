"""Mamba-2 (state space duality): one data-dependent decay per head, whose step size scales the write as well.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Decay, Gates, Row, Rule, outer, read
from kernels.gated_linear_attention import gated_linear_attention


class Mamba2(Rule):
    """S = exp(-Delta e^A) S + k (x) (Delta v),  o = q S + d v,  Delta = softplus(W x + b).

    Source: Dao & Gu, "Transformers are SSMs", 2024; k, q and v are its B, C and x. Checked by numbers against the
        authors' ssd_minimal_discrete and their layer's step (state-spaces/mamba). Differences: k and q per head (its
        groups are as many as the heads), and the head's norm before the gate.
    """

    row = Row(
        "S",
        "-<k S, v>",
        "alpha S, alpha = exp(-Delta e^A) per head",
        "alpha S + k (x) Delta v",
        "q S + d v",
        "-",
        "Dao & Gu, 2024",
    )

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.retention = Decay(width, num_heads)
        self.skip = nn.Parameter(torch.ones(num_heads))

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTHK

    def gates(self, x_BTD: Tensor) -> Gates:
        step, log_decay = self.retention(x_BTD)
        return {"step": step, "log_decay": log_decay.squeeze(-1)}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        matrix = gates["log_decay"].exp()[..., None, None] * state["matrix"] + outer(k_BHK, gates["step"] * v_BHV)
        return read(q_BHK, matrix) + self.skip.unsqueeze(-1) * v_BHV, {"matrix": matrix}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        values = (gates["step"] * v_BTHV).to(v_BTHV.dtype)
        o_BTHV, end = gated_linear_attention(
            q_BTHK, k_BTHK, values, gates["log_decay"], scale=1.0, initial_state=state["matrix"], **how
        )
        return o_BTHV + (self.skip.unsqueeze(-1) * v_BTHV).to(o_BTHV.dtype), {"matrix": end}
