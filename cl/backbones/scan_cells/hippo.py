"""HiPPO-LegS: each channel's history as coefficients of Legendre polynomials over all of the document so far.

Shape legend: B rows, T tokens, D width, C channels, N coefficients of a channel, F features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._heads import require_width
from cl.backbones.scan_cells._base import ScanCell
from cl.core import UserError
from kernels.linear_scan import linear_scan

MOST_ORDER = 12
"""The eigenvectors are those of monomials: beyond this many, float64 cannot change the basis and back."""


class Hippo(ScanCell):
    """c_t = (I + A / 2t)^-1 ((I - A / 2t) c_{t-1} + B u_t / t), u_t = W x_t, t counted from the document's start.

    A_nk = sqrt(2n + 1) sqrt(2k + 1) below the diagonal and n + 1 on it, B_n = sqrt(2n + 1): the bilinear discretisation
    of dc/dt = -A c / t + B u / t. A is fixed and its eigenvalues are 1 .. N, so that the time-varying recurrence is
    diagonal in the basis of its eigenvectors, and a scan.

    Args:
        order: N, at most 12.
        num_channels: C; None takes D / N, at least 1.

    Raises:
        UserError: a value outside its range.

    Cost: D C + C N F multiply-adds a token, and C N^2 for the change of basis; state C N. The scan is in float64.
    Source: Gu et al., 2020 (HiPPO), LegS with the bilinear form; checked by numbers against the authors' HiPPO_LegS
        (HazyResearch/hippo-code). Differences: no recurrent network around it; the coefficients are read by a linear
        map.
    """

    def __init__(self, width: int, units: int, order: int = 8, num_channels: int | None = None) -> None:
        super().__init__()
        if not 1 <= order <= MOST_ORDER:
            raise UserError(f"the order of hippo is {order}; it must be from 1 to {MOST_ORDER}")
        channels = max(1, width // order) if num_channels is None else num_channels
        require_width("num_channels", channels)
        self.state_shape = (channels, order)
        self.input, self.mix = nn.Linear(width, channels), nn.Linear(channels * order, units)

    def run(self, x_BTD: Tensor, h0: Tensor, age_BT: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        u_BTC1 = wide(self.input(x_BTD)).double().unsqueeze(-1)
        _, drive_N, vectors_NN, inverse_NN = constants(self.state_shape[1], str(x_BTD.device))
        age_BT11 = age_BT.double()[..., None, None]
        half_BT1N = torch.arange(1, len(drive_N) + 1, device=x_BTD.device) / (2 * age_BT11)
        a = ((1 - half_BT1N) / (1 + half_BT1N)).expand(*u_BTC1.shape[:3], -1)
        u = (inverse_NN @ drive_N) * u_BTC1 / ((1 + half_BT1N) * age_BT11)
        h, last = linear_scan(a.contiguous(), u, initial_state=h0.double() @ inverse_NN.T, reset=reset_BT)
        return (h @ vectors_NN.T).to(h0.dtype), (last @ vectors_NN.T).to(h0.dtype)

    def step(self, x_BD: Tensor, h: Tensor, age_B: Tensor) -> Tensor:
        matrix_NN, drive_N = constants(self.state_shape[1], str(h.device))[:2]
        u_BC1, age_B11 = wide(self.input(x_BD)).double().unsqueeze(-1), age_B.double()[:, None, None]
        half_BNN = matrix_NN / (2 * age_B11)
        right = h.double() - h.double() @ half_BNN.mT + drive_N * u_BC1 / age_B11
        left = torch.eye(len(drive_N), dtype=torch.float64, device=h.device) + half_BNN
        return torch.linalg.solve_triangular(left, right.mT, upper=False).mT.to(h.dtype)

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.mix(h.flatten(-2).to(x.dtype))
        return y


@lru_cache(maxsize=16)
def constants(order: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, the eigenvectors of A as columns and their inverse, all float64."""
    # made outside of inference mode, so that training may use what an evaluation made first
    with torch.inference_mode(False), torch.no_grad():
        matrix_NN, drive_N = legs(order)
        vectors_NN = eigenvectors(matrix_NN)
        eye = torch.eye(order, dtype=torch.float64)
        inverse_NN = torch.linalg.solve_triangular(vectors_NN, eye, upper=False, unitriangular=True)
        found = (matrix_NN, drive_N, vectors_NN, inverse_NN)
        return tuple(x.to(device) for x in found)  # type: ignore[return-value]


def legs(order: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) of LegS, float64.

    Example:
        >>> [[round(x, 4) for x in row] for row in legs(2)[0].tolist()]
        [[1.0, 0.0], [1.7321, 2.0]]
    """
    root = (2 * torch.arange(order, dtype=torch.float64) + 1).sqrt()
    return (root[:, None] * root).tril(-1) + torch.diag(torch.arange(1.0, order + 1, dtype=torch.float64)), root


def eigenvectors(matrix: Tensor) -> Tensor:
    """Columns v_j with (A - (j + 1) I) v_j = 0 and v_jj = 1, by forward substitution: exact up to rounding."""
    order = matrix.shape[0]
    vectors = torch.eye(order, dtype=torch.float64)
    for j in range(order):
        for n in range(j + 1, order):
            vectors[n, j] = -(matrix[n, j:n] @ vectors[j:n, j]) / (n - j)
    return vectors
