"""Longhorn: the write that an implicit step of online regression makes, so that forgetting follows from the key.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, outer, read
from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention


class Longhorn(Rule):
    """S = (1 - delta k^2) S + delta k (x) v,  o = q S + d v,  delta = beta / (1 + beta |k|^2).

    beta = sigmoid(W x + b). It solves min |S - S_old|^2 + beta |k S - v|^2 in closed form, with k k^T taken as its
    diagonal.

    Args:
        diagonal: false keeps k k^T whole, which is the delta rule with the step size delta.

    Source: Liu et al., "Longhorn: State Space Models are Amortized Online Learners", 2024, and its official code.
        Differences: beta per head in place of per value channel, which would make the decay a matrix.
    """

    row = Row(
        "S",
        "1/2 |k S - v|^2, implicit step",
        "(1 - delta k^2) S, per key channel",
        "(1 - delta k^2) S + delta k (x) v",
        "q S + d v",
        "-",
        "Liu et al., 2024",
    )

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int, *, diagonal: bool = True) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.diagonal = diagonal
        self.strength = nn.Linear(width, num_heads, bias=True)
        self.skip = nn.Parameter(torch.ones(num_heads, value_width))

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTHK

    def gates(self, x_BTD: Tensor) -> Gates:
        raw = self.strength(x_BTD)
        return {"strength": raw.to(torch.promote_types(torch.float32, raw.dtype)).sigmoid()}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        delta_BH1 = _implicit(gates["strength"], k_BHK).unsqueeze(-1)
        if self.diagonal:
            kept = (1 - delta_BH1 * k_BHK.square()).unsqueeze(-1) * state["matrix"]
        else:
            kept = state["matrix"] - outer(delta_BH1 * k_BHK, read(k_BHK, state["matrix"]))
        matrix = kept + outer(delta_BH1 * k_BHK, v_BHV)
        return read(q_BHK, matrix) + self.skip * v_BHV, {"matrix": matrix}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        delta_BTH = _implicit(gates["strength"], k_BTHK)
        start = state["matrix"]
        if self.diagonal:
            log_decay = _log_kept(gates["strength"], k_BTHK)
            values = (delta_BTH.unsqueeze(-1) * v_BTHV).to(v_BTHV.dtype)
            o_BTHV, end = gated_linear_attention(
                q_BTHK, k_BTHK, values, log_decay, scale=1.0, initial_state=start, **how
            )
        else:
            o_BTHV, end = delta_rule(q_BTHK, k_BTHK, v_BTHV, delta_BTH, scale=1.0, initial_state=start, **how)
        return o_BTHV + (self.skip * v_BTHV).to(o_BTHV.dtype), {"matrix": end}


def _implicit(strength: Tensor, k: Tensor) -> Tensor:
    """beta / (1 + beta |k|^2)."""
    return strength / (1 + strength * k.to(strength.dtype).square().sum(-1))


def _log_kept(strength_BTH: Tensor, k_BTHK: Tensor) -> Tensor:
    """log (1 - delta k_i^2), as log (1 + beta (|k|^2 - k_i^2)) - log (1 + beta |k|^2): finite for keys of any size."""
    square = k_BTHK.to(strength_BTH.dtype).square()
    total, beta = square.sum(-1, keepdim=True), strength_BTH.unsqueeze(-1)
    return torch.log1p(beta * (total - square).clamp(min=0)) - torch.log1p(beta * total)
