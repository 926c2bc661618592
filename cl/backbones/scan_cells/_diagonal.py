"""Complex diagonal states with a fixed transition: what LRU and S5 share.

Shape legend: B rows, T tokens, D width, N complex states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._heads import require_width
from cl.backbones.scan_cells._base import ScanCell


class DiagonalCell(ScanCell):
    """h_t = lambda h_{t-1} + scale (B x_t);  y_t = Re(C h_t) + skip x_t. Subclasses define `transition`.

    B and C are complex matrices written as real ones of twice the size.
    """

    is_complex = True

    def __init__(self, width: int, units: int, num_states: int) -> None:
        super().__init__()
        require_width("num_states", num_states)
        self.state_shape = (num_states,)
        self.input = nn.Linear(width, 2 * num_states, bias=False)
        self.output = nn.Linear(2 * num_states, units, bias=False)
        self.skip = nn.Linear(width, units, bias=False)

    def transition(self) -> tuple[Tensor, Tensor]:
        """lambda (N,) complex, and the factor (N,) of the input."""
        raise NotImplementedError

    def _driven(self, x: Tensor) -> Tensor:
        real, imaginary = wide(self.input(x)).chunk(2, -1)
        return torch.complex(real, imaginary)

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        eigenvalue_N, scale_N = self.transition()
        return eigenvalue_N, scale_N * self._driven(x_BTD)

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        eigenvalue_N, scale_N = self.transition()
        return eigenvalue_N * h + scale_N * self._driven(x_BD)

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        seen = torch.cat((h.real, h.imag), -1).to(x.dtype)
        y: Tensor = self.output(seen) + self.skip(x)
        return y
