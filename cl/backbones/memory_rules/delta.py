"""DeltaNet: what the memory says for a key is corrected, not added to.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, Strength, outer, read
from kernels.delta_rule import delta_rule


class Delta(Rule):
    """S = S - beta k (x) (k S - v),  o = q S,  with k and q of length 1 and beta = sigmoid(W x).

    Args:
        negative: let beta reach 2, so that a key's association can change its sign: needed to track parity.

    Source: Schlag et al., 2021; Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024; beta up to
        2 from Grazzi et al., 2024.
    """

    row = Row("S", "1/2 |k S - v|^2", "S", "S - beta k (x) (k S - v)", "q S", "-", "Yang et al., 2024")

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int, *, negative: bool = False) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        self.strength = Strength(width, num_heads, 2.0 if negative else 1.0)

    def gates(self, x_BTD: Tensor) -> Gates:
        return {"strength": self.strength(x_BTD)}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        error_BHV = read(k_BHK, state["matrix"]) - v_BHV
        matrix = state["matrix"] - outer(gates["strength"].unsqueeze(-1) * k_BHK, error_BHV)
        return read(q_BHK, matrix), {"matrix": matrix}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        o_BTHV, end = delta_rule(
            q_BTHK, k_BTHK, v_BTHV, gates["strength"], scale=1.0, initial_state=state["matrix"], **how
        )
        return o_BTHV, {"matrix": end}
