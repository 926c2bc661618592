"""LSTM with coupled gates and a recurrent weight per unit, all time steps solved together by Newton's method.

Shape legend: B rows, T tokens, D width, F units; gates f, o, c.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.rnn_cells._base import RnnCell
from kernels.newton_rnn import newton_rnn


class Lstm(RnnCell):
    """f = sigmoid(W_f x + r_f h + p_f c + b); c' = f c + (1 - f) tanh(W_c x + r_c h);
    o = sigmoid(W_o x + r_o h + p_o c'); h' = o tanh(c').

    Args:
        forget_bias: b at the start; above 0 keeps more.

    Cost: 3 D F multiply-adds a token, and two to four walks of the recurrence; state 2 F (c, h).
    Source: ParaRNN (its LSTM: coupled gates, peepholes, a recurrent weight per unit).
    """

    def __init__(self, width: int, units: int, forget_bias: float = 1.0) -> None:
        super().__init__()
        self.state_shape = (2, units)
        self.input = nn.Linear(width, 3 * units)
        self.recurrent = nn.Parameter(torch.empty(3, units).uniform_(-1, 1))
        self.peephole = nn.Parameter(torch.zeros(2, units))
        # beside the map's own bias, which backbones set to zero
        self.forget_bias = nn.Parameter(torch.full((units,), float(forget_bias)))

    def drive(self, x: Tensor) -> Tensor:
        gates = wide(self.input(x)).unflatten(-1, (3, -1))
        return torch.cat((gates[..., :1, :] + self.forget_bias, gates[..., 1:, :]), -2)

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        c, out = h.unbind(1)
        f = torch.sigmoid(driven_B[:, 0] + self.recurrent[0] * out + self.peephole[0] * c)
        c = f * c + (1 - f) * torch.tanh(driven_B[:, 2] + self.recurrent[2] * out)
        o = torch.sigmoid(driven_B[:, 1] + self.recurrent[1] * out + self.peephole[1] * c)
        out = o * torch.tanh(c)
        return out, torch.stack((c, out), 1)

    def run(self, driven_BT: Tensor, h0: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        return newton_rnn(
            driven_BT,
            self.recurrent,
            cell="lstm",
            peephole=self.peephole,
            initial_state=h0,
            reset=reset_BT,
        )
