"""Retention: a fixed decay per head, and rotary positions.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.backbones._state import State
from cl.backbones.memory_rules._rule import Gates, Row, Rule, outer, read
from cl.backbones.mixers._rotary import require_rope_base, rotary_angles, rotated
from cl.core import UserError
from kernels.gated_linear_attention import gated_linear_attention, retention_decay


class Retnet(Rule):
    """S = gamma_h S + k (x) v,  o = q S / sqrt(K),  gamma_h = 1 - 2^(-5-h),  with rotary q and k.

    Args:
        rope_base: of the rotary angles, above 1.

    Raises:
        UserError: a value outside its range, or keys that cannot be turned in pairs.

    Source: Sun et al., "Retentive Network", 2023. Checked by numbers against fla's naive_retention and, behind a norm
        as a layer has it, against the authors' parallel form (microsoft/torchscale), which rescales each token; it has
        no xPos scaling either. Differences: angles are those of fla, base^(-2i / K); the authors' end at 1 / base.
    """

    row = Row(
        "S", "-<k S, v>", "gamma_h S, fixed per head", "gamma_h S + k (x) v", "q S", "position", "Sun et al., 2023"
    )

    def __init__(
        self, width: int, num_heads: int, key_width: int, value_width: int, *, rope_base: float = 10_000.0
    ) -> None:
        super().__init__(width, num_heads, key_width, value_width)
        if key_width % 2:
            raise UserError(f"key width of retnet is {key_width}; it must be even, for rotary positions")
        require_rope_base(rope_base)
        self.rope_base = rope_base

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.float32, q_BTHK.dtype)
        angles = rotary_angles(position, q_BTHK.shape[1], self.key_width, self.rope_base, q_BTHK.device, wide)
        cos, sin = (each.unsqueeze(1) for each in angles)
        return rotated(q_BTHK, cos, sin), rotated(k_BTHK, cos, sin)

    def gates(self, x_BTD: Tensor) -> Gates:
        log_decay_H = retention_decay(self.num_heads, device=x_BTD.device)
        wide = torch.promote_types(torch.float32, x_BTD.dtype)
        return {"log_decay": log_decay_H.to(wide).expand(*x_BTD.shape[:2], -1)}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        matrix = gates["log_decay"].exp()[..., None, None] * state["matrix"]
        matrix = matrix + outer(k_BHK, v_BHV)
        return read(q_BHK, matrix) * self.key_width**-0.5, {"matrix": matrix}

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        o_BTHV, end = gated_linear_attention(
            q_BTHK, k_BTHK, v_BTHV, gates["log_decay"], initial_state=state["matrix"], **how
        )
        return o_BTHV, {"matrix": end}
