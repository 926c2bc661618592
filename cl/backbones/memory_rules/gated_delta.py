"""Gated DeltaNet: forget by one rate per head, then correct.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Decay, Gates, Row, Rule, Strength, outer, read
from kernels.delta_rule import delta_rule


class GatedDelta(Rule):
    """S' = alpha S,  S = S' - beta k (x) (k S' - v),  o = q S,  with k and q of length 1.

    Args:
        negative: let beta reach 2, so that a key's association can change its sign.

    Source: Yang, Kautz & Hatamizadeh, "Gated Delta Networks", 2024.
    """

    row = Row(
        "S",
        "1/2 |k S - v|^2",
        "alpha S, per head",
        "alpha S - beta k (x) (alpha k S - v)",
        "q S",
        "-",
        "Yang et al., 2024",
    )

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int, *, negative: bool = False) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.strength = Strength(width, num_heads, 2.0 if negative else 1.0)
        self.retention = Decay(width, num_heads)

    def gates(self, x_BTD: Tensor) -> Gates:
        return {"strength": self.strength(x_BTD), "log_decay": self.retention(x_BTD)[1].squeeze(-1)}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        kept = gates["log_decay"].exp()[..., None, None] * state["matrix"]
        matrix = kept - outer(gates["strength"].unsqueeze(-1) * k_BHK, read(k_BHK, kept) - v_BHV)
        return read(q_BHK, matrix), {"matrix": matrix}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        o_BTHV, end = delta_rule(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            gates["strength"],
            gates["log_decay"],
            scale=1.0,
            initial_state=state["matrix"],
            **how,
        )
        return o_BTHV, {"matrix": end}
