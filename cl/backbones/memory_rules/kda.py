"""Kimi Delta Attention: forget by a rate per key channel, then correct.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from torch import Tensor

from cl.backbones._heads import require_width
from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Decay, Gates, Row, outer, read
from cl.backbones.memory_rules.gated_delta import GatedDelta


class Kda(GatedDelta):
    """S' = diag(alpha) S,  S = S' - beta k (x) (k S' - v),  o = q S,  with k and q of length 1.

    Args:
        negative: let beta reach 2, so that a key's association can change its sign.
        rank: of the decay's projection; None takes the value width.

    Raises:
        UserError: a rank below 1.

    Source: Kimi team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025. Differences: the output
        gate is SiLU, as for all rules, in place of a sigmoid of low rank.
    """

    row = Row(
        "S",
        "1/2 |k S - v|^2",
        "diag(alpha) S, per key channel",
        "S' - beta k (x) (k S' - v), S' = diag(alpha) S",
        "q S",
        "-",
        "Kimi team, 2025",
    )

    def __init__(
        self,
        width: int,
        num_heads: int,
        key_width: int,
        value_width: int,
        *,
        negative: bool = False,
        rank: int | None = None,
    ) -> None:
        super().__init__(width, num_heads, key_width, value_width, negative=negative)
        rank = value_width if rank is None else rank
        require_width("rank", rank)
        self.retention = Decay(width, num_heads, key_width, rank)

    def gates(self, x_BTD: Tensor) -> Gates:
        return {"strength": self.strength(x_BTD), "log_decay": self.retention(x_BTD)[1]}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        kept = gates["log_decay"].exp().unsqueeze(-1) * state["matrix"]
        matrix = kept - outer(gates["strength"].unsqueeze(-1) * k_BHK, read(k_BHK, kept) - v_BHV)
        return read(q_BHK, matrix), {"matrix": matrix}
