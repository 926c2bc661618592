"""minGRU: a GRU whose gates do not look at the state.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.scan_cells._base import ScanCell
from cl.core import UserError

ACTIVATIONS = ("linear", "positive")


class Mingru(ScanCell):
    """h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t), z_t = sigmoid(W_z x_t).

    Args:
        activation: g; "linear" is the identity, "positive" is x + 1/2 above 0 and sigmoid(x) below, which the source's
            log-space form needs.

    Raises:
        UserError: another activation.

    Cost: 2 D F multiply-adds a token; state F.
    Source: Feng et al., 2024 (Were RNNs All We Needed?); in the spirit of it: "positive" was checked by numbers against
        lucidrains/minGRU-pytorch, which is not the authors'. Differences: no log-space form, see `kernels.linear_scan`.
    """

    def __init__(self, width: int, units: int, activation: str = "linear") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"the activation of mingru is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        self.activation, self.state_shape = activation, (units,)
        self.update, self.candidate = nn.Linear(width, units), nn.Linear(width, units)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, h = wide(self.update(x)).sigmoid(), wide(self.candidate(x))
        if self.activation == "positive":
            h = torch.where(h >= 0, h + 0.5, h.sigmoid())
        return z, h

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        z_BTF, h_BTF = self._gates(x_BTD)
        return 1 - z_BTF, z_BTF * h_BTF

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        z_BF, candidate_BF = self._gates(x_BD)
        return torch.lerp(h, candidate_BF, z_BF)

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        return h
