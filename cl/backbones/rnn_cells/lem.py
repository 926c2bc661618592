"""LEM: long expressive memory, a discretised system of two multiscale differential equations.

Shape legend: B rows, T tokens, D width, F units; state z, y.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.rnn_cells._base import RnnCell
from cl.core import UserError


class Lem(RnnCell):
    """d = dt sigmoid(W_1 y + V_1 x), e = dt sigmoid(W_2 y + V_2 x); z' = (1 - d) z + d tanh(W_z y + V_z x);
    y' = (1 - e) y + e tanh(W_y z' + V_y x).

    Args:
        step_s: dt, the longest step that a unit takes, in (0, 1].

    Raises:
        UserError: a step outside its range.

    Cost: 4 D F + 4 F^2 multiply-adds a token, T steps in a row; state 2 F.
    Source: in the spirit of Rusch et al., 2022 (Long Expressive Memory), from the project's notes on it.
    """

    def __init__(self, width: int, units: int, step_s: float = 1.0) -> None:
        super().__init__()
        if not 0 < step_s <= 1:
            raise UserError(f"step_s of lem is {step_s!r}; it must be above 0 and at most 1")
        self.state_shape, self.step_s = (2, units), step_s
        self.input = nn.Linear(width, 4 * units)
        self.recurrent = nn.Linear(units, 3 * units, bias=False)
        self.from_z = nn.Linear(units, units, bias=False)

    def drive(self, x: Tensor) -> Tensor:
        return wide(self.input(x))

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, y = h.unbind(1)
        into_d, into_e, into_z, into_y = driven_B.chunk(4, -1)
        from_d, from_e, from_z = _mapped(self.recurrent, y).chunk(3, -1)
        d, e = (self.step_s * torch.sigmoid(a) for a in (into_d + from_d, into_e + from_e))
        z = (1 - d) * z + d * torch.tanh(into_z + from_z)
        y = (1 - e) * y + e * torch.tanh(into_y + _mapped(self.from_z, z))
        return y, torch.stack((z, y), 1)


def _mapped(layer: nn.Linear, h: Tensor) -> Tensor:
    """A state through a layer whose weights may be narrower than states are."""
    y: Tensor = layer(h.to(layer.weight.dtype))
    return wide(y)
