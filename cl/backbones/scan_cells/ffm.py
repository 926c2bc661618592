"""Fast and forgetful memory: decaying, turning copies of a few traces.

Shape legend: B rows, T tokens, D width, F features, M traces, C contexts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._heads import require_width
from cl.backbones.scan_cells._base import ScanCell
from cl.core import UserError


class Ffm(ScanCell):
    """S_t = gamma * S_{t-1} + x~_t 1^T, gamma_mc = exp(-|a_m| + i b_c), x~ = (W x) * sigmoid(W_i x).

    y_t = LayerNorm(W_o [Re S_t, Im S_t]) * sigmoid(W_g x_t) + (W_s x_t) * (1 - sigmoid(W_g x_t))

    Args:
        num_traces: M.
        num_contexts: C.
        longest: steps after which the slowest trace has decayed to 1 / e, and longest period of a context.

    Raises:
        UserError: `longest` not above 1, or a number below 1.

    Cost: 2 D M + 2 M C F + 2 D F multiply-adds a token; state 2 M C.
    Source: Morad et al., 2023 (Reinforcement Learning with Fast and Forgetful Memory). Differences: the starts of a and
        b are in the spirit of the source, a spread linearly in rate and b in period; the scan runs in steps, so that
        spans have no limit.
    """

    is_complex = True

    def __init__(
        self, width: int, units: int, num_traces: int = 16, num_contexts: int = 4, longest: float = 1024.0
    ) -> None:
        super().__init__()
        require_width("num_traces", num_traces)
        require_width("num_contexts", num_contexts)
        if not longest > 1:
            raise UserError(f"the longest span of ffm is {longest} steps; it must be above 1")
        self.state_shape = (num_traces, num_contexts)
        self.trace, self.trace_gate = nn.Linear(width, num_traces), nn.Linear(width, num_traces)
        self.decay = nn.Parameter(torch.linspace(1 / longest, 1.0, num_traces))
        self.frequency = nn.Parameter(2 * math.pi / torch.linspace(longest, 2.0, num_contexts))
        self.mix, self.norm = nn.Linear(2 * num_traces * num_contexts, units), nn.LayerNorm(units)
        self.read_gate, self.skip = nn.Linear(width, units), nn.Linear(width, units)

    def _gamma(self) -> Tensor:
        size_M1, angle_C = torch.exp(-wide(self.decay).abs())[:, None], wide(self.frequency)
        return torch.complex(size_M1 * angle_C.cos(), size_M1 * angle_C.sin())

    def _written(self, x: Tensor) -> Tensor:
        x_M1 = (wide(self.trace(x)) * wide(self.trace_gate(x)).sigmoid()).unsqueeze(-1)
        written = x_M1.expand(*x_M1.shape[:-1], self.state_shape[1])
        return torch.complex(written, torch.zeros_like(written))

    def elements(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self._gamma(), self._written(x_BTD)

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        return self._gamma() * h + self._written(x_BD)

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        flat = torch.view_as_real(h).flatten(-3)
        gate = self.read_gate(x).sigmoid()
        y: Tensor = self.norm(self.mix(flat.to(x.dtype))) * gate + self.skip(x) * (1 - gate)
        return y
