"""Leaky recurrent units with trainable time constants.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import Timescale, wide
from cl.backbones.rnn_cells._base import RnnCell


class LeakyTau(RnnCell):
    """h_t = (1 - 1/tau) h_{t-1} + (1/tau) tanh(W_r h_{t-1} + W_x x_t + b), tau > 1 trained, one a unit.

    Args:
        shortest, longest: steps, between which the time constants start, spread on a logarithmic scale.

    Attributes:
        timescale: `timescale()` is tau; its mean and largest value are traced as tau_mean and tau_max.

    Cost: D F + F^2 multiply-adds a token, T steps in a row; state F.
    Source: the networks of Emergent mechanisms for long timescales depend on training curriculum (Khajehabdollahi et
        al.), whose tasks are parity and match of the last N inputs; as in their code's variant that leaks outside of
        the nonlinearity. Differences: tanh where they have a leaky ReLU; units may excite themselves; tau is kept above
        1 by a softplus, not a clamp.
    """

    def __init__(self, width: int, units: int, shortest: float = 1.5, longest: float = 2.0) -> None:
        super().__init__()
        self.state_shape = (units,)
        self.input = nn.Linear(width, units)
        self.recurrent = nn.Parameter(torch.randn(units, units) / units**0.5)
        self.timescale = Timescale(units, shortest, longest)

    def drive(self, x: Tensor) -> Tensor:
        return wide(self.input(x))

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rate = 1 / self.timescale()
        h = (1 - rate) * h + rate * torch.tanh(driven_B + h @ wide(self.recurrent))
        return h, h
