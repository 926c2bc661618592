"""LRU: a linear recurrence with complex eigenvalues inside the unit circle.

Shape legend: N complex states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.scan_cells._diagonal import DiagonalCell
from cl.core import UserError


class Lru(DiagonalCell):
    """h_t = lambda h_{t-1} + gamma (B x_t), lambda = exp(-exp(nu) + i exp(theta)), y_t = Re(C h_t) + skip x_t.

    Args:
        num_states: N; None takes the width.
        r_min, r_max: magnitudes of lambda at the start, uniform in area between them.
        max_phase: angles of lambda at the start, uniform from 0 to it.

    Raises:
        UserError: not 0 <= r_min < r_max < 1, or another value outside its range.

    Cost: 2 D N + 2 N F + D F multiply-adds a token; state 2 N.
    Source: Orvieto et al., 2023 (Resurrecting Recurrent Neural Networks for Long Sequences): the normalisation gamma is
        trained from its start sqrt(1 - |lambda|^2). No code of the authors was found; lambda and gamma were checked by
        numbers against NicolasZucchet/minimal-LRU, made from the paper's pseudo-code. Differences: `skip` is a matrix,
        the source's a vector; B and C start as other linear layers here do.
    """

    def __init__(
        self,
        width: int,
        units: int,
        num_states: int | None = None,
        r_min: float = 0.0,
        r_max: float = 0.99,
        max_phase: float = 2 * math.pi,
    ) -> None:
        if not 0 <= r_min < r_max < 1:
            raise UserError(f"lru starts with magnitudes from {r_min} to {r_max}; they must be within [0, 1), in order")
        if not max_phase > 0:
            raise UserError(f"max_phase of lru is {max_phase!r}; it must be a number above 0")
        number = width if num_states is None else num_states
        super().__init__(width, units, number)
        area_N = torch.rand(number) * (r_max**2 - r_min**2) + r_min**2
        # never exactly 0, whose logarithm is not finite
        area_N = area_N.clamp_min(1e-6)
        self.nu = nn.Parameter(torch.log(-0.5 * torch.log(area_N)))
        self.theta = nn.Parameter(torch.log(max_phase * torch.rand(number).clamp_min(1e-6)))
        self.log_gamma = nn.Parameter(0.5 * torch.log1p(-area_N))

    def transition(self) -> tuple[Tensor, Tensor]:
        magnitude_N, angle_N = torch.exp(-wide(self.nu).exp()), wide(self.theta).exp()
        return torch.polar(magnitude_N, angle_N), wide(self.log_gamma).exp()
