"""One rule of a matrix memory: its gates, one token as the paper writes it, and many tokens by a kernel.

Shape legend: B rows, T tokens, D width, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl.backbones._state import State
from kernels.common.fused import unit

Gates = dict[str, Tensor]
"""What a rule reads from the tokens besides q, k and v: (B, T, ...) by name."""


@dataclass(frozen=True)
class Row:
    """A rule in terms of regression at test time: S is fitted so that k S gives v.

    Args:
        memory: what holds the associations.
        loss: of one token, whose gradient writes.
        retention: what is kept of the memory before the write.
        step: the write.
        read: what a query gives.
        extra: state besides the memory.
        source: who published it.
    """

    memory: str
    loss: str
    retention: str
    step: str
    read: str
    extra: str
    source: str


class Rule(nn.Module):
    """Base of every rule; subclasses define all of `gates`, `step` and `chunk`.

    Args:
        width: D of the tokens that gates are made from.
        num_heads, key_width, value_width: H, K and V.

    Class attributes:
        row: its line in docs/memory.md.
    """

    row: ClassVar[Row]

    def __init__(self, width: int, num_heads: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.width, self.num_heads, self.key_width, self.value_width = width, num_heads, key_width, value_width

    def init_state(self, zeros: Tensor) -> State:
        """Memory before the first token, made from `zeros` (B, H, K, V)."""
        return {"matrix": zeros}

    def prepare(self, q_BTHK: Tensor, k_BTHK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Queries and keys as the memory takes them; of length 1 here.

        Args:
            position: of the first token, counted from where the state began.
        """
        return unit(q_BTHK), unit(k_BTHK)

    def gates(self, x_BTD: Tensor) -> Gates:
        """What the tokens decide, in float32."""
        return {}

    def step(self, state: State, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, gates: Gates) -> tuple[Tensor, State]:
        """Write one token and read, as the paper has it; the oracle of `chunk`.

        Returns:
            (B, H, V), and the memory after the token.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def chunk(
        self, state: State, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, gates: Gates, **how: Any
    ) -> tuple[Tensor, State]:
        """Many tokens at once.

        Args:
            how: `cu_seqlens` and `chunk` of the kernels; with the former, states are one per document.

        Returns:
            (B, T, H, V), and the memory after the last token.
        """
        raise NotImplementedError(f"{type(self).__name__} must define chunk")


def outer(k_BHK: Tensor, v_BHV: Tensor) -> Tensor:
    """k (x) v (B, H, K, V)."""
    return k_BHK.unsqueeze(-1) * v_BHV.unsqueeze(-2)


def read(q_BHK: Tensor, s_BHKV: Tensor) -> Tensor:
    """q S (B, H, V)."""
    return (q_BHK.unsqueeze(-2) @ s_BHKV).squeeze(-2)


class Decay(nn.Module):
    """Log decay of the state space models: g = -exp(A_log) softplus(W x + bias), one per head or more.

    Initial steps are drawn log-uniformly from 0.001 to 0.1, A uniformly from 1 to 16.

    Args:
        per_head: numbers per head, that share the head's A.
        rank: of W; None takes a full one.

    Source: Mamba-2 (Dao & Gu, 2024), Gated DeltaNet (Yang et al., 2024), Kimi Delta Attention (2025).
    """

    def __init__(self, width: int, num_heads: int, per_head: int = 1, rank: int | None = None) -> None:
        super().__init__()
        self.num_heads, outputs = num_heads, num_heads * per_head
        self.project: nn.Module = (
            nn.Linear(width, outputs, bias=False)
            if rank is None
            else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, outputs, bias=False))
        )
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        step = torch.empty(outputs).uniform_(math.log(0.001), math.log(0.1)).exp()
        # softplus of it is the step again
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes and log decays (B, T, H, per_head)."""
        raw = self.project(x_BTD)
        step = nn.functional.softplus(raw.to(torch.promote_types(torch.float32, raw.dtype)) + self.bias)
        step_BTHG = step.unflatten(-1, (self.num_heads, -1))
        return step_BTHG, -self.log_rate.exp().unsqueeze(-1) * step_BTHG


class Strength(nn.Module):
    """Write strength per head: beta = sigmoid(W x), in (0, 1), or doubled."""

    def __init__(self, width: int, num_heads: int, largest: float = 1.0) -> None:
        super().__init__()
        self.project, self.largest = nn.Linear(width, num_heads, bias=False), largest

    def forward(self, x_BTD: Tensor) -> Tensor:
        raw = self.project(x_BTD)
        beta_BTH: Tensor = self.largest * raw.to(torch.promote_types(torch.float32, raw.dtype)).sigmoid()
        return beta_BTH
