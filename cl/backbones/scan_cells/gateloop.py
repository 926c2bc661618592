"""GateLoop: a linear recurrence whose decay and turn in the complex plane the token decides, for every channel.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.scan_cells._base import ScanCell


class Gateloop(ScanCell):
    """h_t = a_t h_{t-1} + k_t v_t, a_t = sigmoid(W_r x_t + b_r) exp(i W_p x_t), y_t = q_t Re(h_t); q, k, v = W x_t.

    k gates the input and q the output, both without an activation. It is the rule `gateloop` of linear_memory with
    heads of one key and one value, so that the state is one complex number a channel.

    Cost: 5 D F multiply-adds a token; state 2 F.
    Source: Katsch, 2023 (GateLoop), with as many heads as channels. Checked by numbers against the operator in
        lucidrains/gateloop-transformer, which its author has reviewed, says its README. Differences: that code takes
        |a| and the phase from one complex number z = W x, as sigmoid(|z|) and its angle; here magnitudes begin between
        0.9 and 0.999.
    """

    is_complex = True

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.state_shape = (units,)
        self.query, self.key, self.value, self.retention, self.phase = (
            nn.Linear(width, units, bias=False) for _ in range(5)
        )
        self.bias = nn.Parameter(torch.linspace(0.9, 0.999, units).logit())

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        size_BTF = (wide(self.retention(x_BTD)) + self.bias).sigmoid()
        written_BTF = wide(self.key(x_BTD)) * wide(self.value(x_BTD))
        a_BTF = torch.polar(size_BTF, wide(self.phase(x_BTD)))
        return a_BTF, torch.complex(written_BTF, torch.zeros_like(written_BTF))

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        a_BF, u_BF = self.elements(x_BD)
        return a_BF * h + u_BF

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.query(x) * h.real.to(x.dtype)
        return y
