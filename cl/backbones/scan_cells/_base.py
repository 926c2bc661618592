"""A cell whose states are a linear scan: what it must say about itself, and the scan.

Shape legend: B rows, T tokens, D width of the mixer, F features that are read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.linear_scan import linear_scan


class ScanCell(nn.Module):
    """h_t = a_t * h_{t-1} + u_t, element by element: the memory monoid with elements (a, u); a reset is a = 0.

    Subclasses define `elements` (a and u of every token), `read` (what is seen of the states) and `step` (one token, as
    the source writes it: the oracle of the scan).

    Attributes:
        state_shape: of one row's state.
        is_complex: whether states are complex; they are kept as pairs of real numbers, so that a state is a plain
            tensor of floats.
    """

    state_shape: tuple[int, ...]
    is_complex = False

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Of one row's state as it is kept."""
        return (*self.state_shape, 2) if self.is_complex else self.state_shape

    def run(self, x_BTD: Tensor, h0: Tensor, age_BT: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """All states of a call, and the last one as it is kept."""
        a, u = self.elements(x_BTD)
        h, last = linear_scan(a.expand_as(u).contiguous(), u, initial_state=self.opened(h0), reset=reset_BT)
        return h, self.closed(last)

    def opened(self, kept: Tensor) -> Tensor:
        """The state as it is computed with."""
        return torch.view_as_complex(kept) if self.is_complex else kept

    def closed(self, h: Tensor) -> Tensor:
        """The state as it is kept."""
        return torch.view_as_real(h) if self.is_complex else h
