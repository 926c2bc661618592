"""GRU with a recurrent weight per unit, all time steps solved together by Newton's method.

Shape legend: B rows, T tokens, D width, F units; gates z, s, c.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.rnn_cells._base import RnnCell
from kernels.newton_rnn import newton_rnn


class Gru(RnnCell):
    """z, s = sigmoid(W_z x + r_z h), sigmoid(W_s x + r_s h); h' = (1 - z) h + z tanh(W_c x + r_c (s h)).

    Cost: 3 D F multiply-adds a token, and two to four walks of the recurrence; state F.
    Source: ParaRNN (its GRU: a recurrent weight per unit makes it solvable in parallel). A matrix per head, in order
        only, is `kernels.sequential_rnn`.
    """

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.state_shape = (units,)
        self.input = nn.Linear(width, 3 * units)
        self.recurrent = nn.Parameter(torch.empty(3, units).uniform_(-1, 1))

    def drive(self, x: Tensor) -> Tensor:
        return wide(self.input(x)).unflatten(-1, (3, -1))

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.sigmoid(driven_B[:, 0] + self.recurrent[0] * h)
        s = torch.sigmoid(driven_B[:, 1] + self.recurrent[1] * h)
        h = (1 - z) * h + z * torch.tanh(driven_B[:, 2] + self.recurrent[2] * (s * h))
        return h, h

    def run(self, driven_BT: Tensor, h0: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        return newton_rnn(driven_BT, self.recurrent, cell="gru", initial_state=h0, reset=reset_BT)
