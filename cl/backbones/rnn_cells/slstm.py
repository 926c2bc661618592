"""sLSTM: scalar memories with exponential input gates and a recurrent matrix per head.

Shape legend: B rows, T tokens, D width, H heads, K units of a head; gates i, f, z, o; state c, n, m, h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._heads import require_width
from cl.backbones.rnn_cells._base import RnnCell
from cl.core import UserError
from kernels.sequential_rnn import sequential_rnn


class Slstm(RnnCell):
    """c' = f c + i tanh(a_z), n' = f n + i, h' = sigmoid(a_o) c' / n', i = exp(a_i), f = sigmoid(a_f) (or exp(a_f)).

    a_g = W_g x + h R_g + b_g; everything is kept relative to exp(m'), m' = max(log f + m, a_i).

    Args:
        num_heads: H, each with matrices R of its own.
        is_exponential: f = exp(a_f).
        forget_bias: b_f at the start; above 0 keeps more.

    Raises:
        UserError: units are no multiple of the heads, of which there is at least one.

    Cost: 4 D F + 4 F K multiply-adds a token, T steps in a row; state 4 F.
    Source: xLSTM (Beck et al., 2024). Checked by numbers against the authors' slstm_forward_pointwise (NX-AI/xlstm),
        which has f = sigmoid(a_f) only. Differences: of the state as in `kernels.sequential_rnn`; R starts at random
        and b_f at one number, there at 0 and at a power law over units and depth.
    """

    def __init__(
        self,
        width: int,
        units: int,
        num_heads: int = 4,
        is_exponential: bool = False,
        forget_bias: float = 3.0,
    ) -> None:
        super().__init__()
        require_width("num_heads", num_heads)
        if units % num_heads:
            raise UserError(f"slstm has {units} units for {num_heads} heads; they must be a multiple of the heads")
        size = units // num_heads
        self.state_shape, self.is_exponential = (4, num_heads, size), is_exponential
        self.input = nn.Linear(width, 4 * units)
        self.recurrent = nn.Parameter(torch.randn(4, num_heads, size, size) / size**0.5 / 2)
        # beside the map's own bias, which backbones set to zero
        self.forget_bias = nn.Parameter(torch.full((num_heads, size), float(forget_bias)))

    def drive(self, x: Tensor) -> Tensor:
        i, f, z, o = wide(self.input(x)).unflatten(-1, (4, *self.state_shape[1:])).unbind(-3)
        return torch.stack((i, f + self.forget_bias, z, o), -3)

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        c, n, m, out = h.unbind(1)
        i, f, z, o = (driven_B + torch.einsum("bhk,ghkl->bghl", out, wide(self.recurrent))).unbind(1)
        log_f = f if self.is_exponential else F.logsigmoid(f)
        # an empty memory has no scale of its own
        carried = torch.where(n == 0, i, log_f + m)
        m = torch.maximum(carried, i)
        keep, write = torch.where(n == 0, 0.0, torch.exp(carried - m)), torch.exp(i - m)
        c, n = keep * c + write * torch.tanh(z), keep * n + write
        out = torch.sigmoid(o) * c / n
        return out.flatten(1), torch.stack((c, n, m, out), 1)

    def run(self, driven_BT: Tensor, h0: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        cell = "slstm_exp" if self.is_exponential else "slstm"
        h, last = sequential_rnn(driven_BT, wide(self.recurrent), cell=cell, initial_state=h0, reset=reset_BT)
        return h.flatten(2), last
