"""minLSTM: an LSTM whose gates do not look at the state and are normalised to sum to one.

Shape legend: B rows, T tokens, D width, F units.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.scan_cells._base import ScanCell


class Minlstm(ScanCell):
    """h_t = f'_t h_{t-1} + i'_t W_h x_t, f' = f / (f + i), i' = i / (f + i), f, i = sigmoid(W_f x), sigmoid(W_i x).

    Cost: 3 D F multiply-adds a token; state F.
    Source: Feng et al., 2024 (Were RNNs All We Needed?); in the spirit of it: the recurrence was checked by numbers
        against lucidrains/minGRU-pytorch, which is not the authors'. Differences: that code has the log-space form, and
        passes the candidate through the g that it needs (see mingru); here neither, see `kernels.linear_scan`.
    """

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.state_shape = (units,)
        self.forget, self.input = nn.Linear(width, units), nn.Linear(width, units)
        self.candidate = nn.Linear(width, units)

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        keep, write = self._gates(x_BTD)
        return keep, write * wide(self.candidate(x_BTD))

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        keep, write = self._gates(x_BD)
        return keep * h + write * wide(self.candidate(x_BD))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # f / (f + i) = sigmoid(log f - log i), which no gate can underflow
        odds = F.logsigmoid(wide(self.forget(x))) - F.logsigmoid(wide(self.input(x)))
        return odds.sigmoid(), (-odds).sigmoid()

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        return h
