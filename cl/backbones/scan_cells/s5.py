"""S5: a diagonal state space model, discretised by zero-order hold with trained step sizes.

Shape legend: N complex states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones.scan_cells._diagonal import DiagonalCell
from cl.core import UserError


class S5(DiagonalCell):
    """h_t = exp(Lambda Delta) h_{t-1} + (exp(Lambda Delta) - 1) / Lambda (B x_t), y_t = Re(C h_t) + skip x_t.

    Lambda starts at the eigenvalues of the normal part of HiPPO-LegS, one of each conjugate pair.

    Args:
        num_states: N; None takes half the width.
        shortest, longest: bounds of the step sizes Delta at the start, drawn log-uniformly.

    Raises:
        UserError: not 0 < shortest <= longest, or another value outside its range.

    Cost: 2 D N + 2 N F + D F multiply-adds a token; state 2 N.
    Source: Smith et al., 2023 (Simplified State Space Layers for Sequence Modeling). The start of Lambda and the
        zero-order hold were checked by numbers against the authors' code (lindermanlab/S5). Differences: B and C are
        drawn in the eigenbasis itself, not rotated into it; one block; Lambda stays left of the axis, there by a clip
        if asked; y is not doubled for the other half of the pairs; `skip` is a matrix.
    """

    def __init__(
        self,
        width: int,
        units: int,
        num_states: int | None = None,
        shortest: float = 1e-3,
        longest: float = 1e-1,
    ) -> None:
        if not 0 < shortest <= longest:
            raise UserError(f"the steps of s5 go from {shortest} to {longest}; they must be above 0 and in this order")
        number = max(1, width // 2) if num_states is None else num_states
        super().__init__(width, units, number)
        eigenvalue_N = legs_eigenvalues(number)
        self.log_decay = nn.Parameter((-eigenvalue_N.real).log().float())
        self.frequency = nn.Parameter(eigenvalue_N.imag.float())
        spread = math.log(longest) - math.log(shortest)
        self.log_step = nn.Parameter(torch.rand(number) * spread + math.log(shortest))

    def transition(self) -> tuple[Tensor, Tensor]:
        eigenvalue_N = torch.complex(-wide(self.log_decay).exp(), wide(self.frequency))
        discrete_N = torch.exp(eigenvalue_N * wide(self.log_step).exp())
        return discrete_N, (discrete_N - 1) / eigenvalue_N


def legs_eigenvalues(number: int) -> Tensor:
    """Eigenvalues -1/2 + i w, w > 0, of the normal part of HiPPO-LegS with 2 * `number` states, complex128.

    A = -(lower triangle of sqrt(2n + 1) sqrt(2k + 1), n + 1 on the diagonal) is a normal matrix minus the product of
    p_n = sqrt(n + 1/2) with itself.
    """
    n = torch.arange(2 * number, dtype=torch.float64)
    root, p = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    matrix = -((root[:, None] * root).tril(-1) + torch.diag(n + 1)) + p[:, None] * p
    # -1/2 on the diagonal, and the rest antisymmetric: its eigenvalues come from a Hermitian matrix
    skew = (matrix - matrix.T) / 2
    frequency = torch.linalg.eigvalsh(-1j * skew)[number:]
    return torch.complex(torch.full_like(frequency, -0.5), frequency)
