"""Bilinear recurrence: the token chooses the matrix that moves the state, and nothing is added.

Shape legend: B rows, T tokens, D width, F units, G blocks of N units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._heads import require_width
from cl.backbones.rnn_cells._base import RnnCell
from cl.core import UserError


class Bilinear(RnnCell):
    """h_t = u / |u|, u = (A_0 + sum_i x_i A_i) h_{t-1}, block by block; A_0 starts as the identity, h_0 as a parameter.

    Args:
        block: N, units that move each other; a block of all units can be any finite automaton.

    Raises:
        UserError: units are no multiple of `block`, or it is below 1.

    Cost: D F N + F N multiply-adds a token, T steps in a row; state F.
    Source: in the spirit of Revisiting Bi-Linear State Transitions in Recurrent Neural Networks, from the project's
        notes on it. Differences: each block is kept at unit length, which the direction of a product of matrices does
        not feel.
    """

    def __init__(self, width: int, units: int, block: int = 8) -> None:
        super().__init__()
        require_width("block", block)
        block = min(block, units)
        if units % block:
            raise UserError(f"bilinear has {units} units in blocks of {block}; they must be a multiple of the block")
        self.state_shape = (units // block, block)
        self.input = nn.Linear(width, units * block, bias=False)
        self.still = nn.Parameter(torch.eye(block).repeat(units // block, 1, 1))
        self.begin = nn.Parameter(torch.nn.functional.normalize(torch.randn(self.state_shape), dim=-1))

    def drive(self, x: Tensor) -> Tensor:
        return wide(self.input(x)).unflatten(-1, self.still.shape) + self.still

    def start(self, zeros: Tensor) -> Tensor:
        return zeros + torch.nn.functional.normalize(self.begin, dim=-1)

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.nn.functional.normalize((driven_B @ h.unsqueeze(-1)).squeeze(-1), dim=-1)
        return h.flatten(1), h
