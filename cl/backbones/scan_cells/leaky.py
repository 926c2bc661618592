"""Leaky units with trainable time constants and no recurrent weights: a bank of low-pass filters.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

from torch import Tensor, nn

from cl.backbones._cells import Timescale, wide
from cl.backbones.scan_cells._base import ScanCell


class Leaky(ScanCell):
    """h_t = (1 - 1/tau) h_{t-1} + (1/tau) tanh(W x_t + b), tau > 1 trained, one a unit.

    Args:
        shortest, longest: steps, between which the time constants start, spread on a logarithmic scale.

    Cost: D F multiply-adds a token; state F.
    Source: leaky integrator units; with recurrent weights they are the cell leaky_tau of nonlinear_rnn.
    """

    def __init__(self, width: int, units: int, shortest: float = 1.5, longest: float = 100.0) -> None:
        super().__init__()
        self.state_shape = (units,)
        self.input, self.timescale = nn.Linear(width, units), Timescale(units, shortest, longest)

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        rate_F = 1 / self.timescale()
        return 1 - rate_F, rate_F * wide(self.input(x_BTD)).tanh()

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        tau_F = self.timescale()
        return (1 - 1 / tau_F) * h + wide(self.input(x_BD)).tanh() / tau_F

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        return h
