"""Augmentation of feature maps: random crops, and the share of a mixture of two.

Shape legend: B rows, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_AREA, LARGEST_ASPECT = 2 / 7, 4 / 3


def resized_crops(maps_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each map, enlarged to its size, bilinear.

    Area uniform between 2/7 and 1 of the map, aspect log-uniform between 3/4 and 4/3 and cut where a side would be
    longer than the map's, place uniform.
    """
    num = len(maps_BCHW)
    area, aspect, left, top = torch.rand(4, num, generator=generator).to(maps_BCHW)
    area = SMALLEST_AREA + (1 - SMALLEST_AREA) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(LARGEST_ASPECT))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # in units of half a map, as an affine grid has it
    boxes_B23 = maps_BCHW.new_zeros(num, 2, 3)
    boxes_B23[:, 0, 0], boxes_B23[:, 0, 2] = width, (1 - width) * (2 * left - 1)
    boxes_B23[:, 1, 1], boxes_B23[:, 1, 2] = height, (1 - height) * (2 * top - 1)
    grid = F.affine_grid(boxes_B23, list(maps_BCHW.shape), align_corners=False)
    return F.grid_sample(maps_BCHW, grid, padding_mode="border", align_corners=False)


def beta(concentration: float, generator: torch.Generator) -> float:
    """A draw from Beta(c, c), as a / (a + b) of two draws from Gamma(c).

    Example:
        >>> 0 < beta(0.1, torch.Generator().manual_seed(0)) < 1
        True
    """
    # in logarithms: small concentrations draw numbers too small for floats
    logs = [_log_gamma_draw(concentration, generator) for _ in range(2)]
    return 1 / (1 + math.exp(min(700.0, logs[1] - logs[0])))


def _log_gamma_draw(concentration: float, generator: torch.Generator) -> float:
    """Logarithm of a draw from Gamma(c): Marsaglia & Tsang, 2000, for c + 1, times uniform^(1/c)."""
    d = concentration + 1 - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        x = torch.randn((), generator=generator, dtype=torch.float64).item()
        u = max(torch.rand((), generator=generator, dtype=torch.float64).item(), 1e-300)
        v = (1 + c * x) ** 3
        if v > 0 and math.log(u) < 0.5 * x * x + d - d * v + d * math.log(v):
            break
    u = max(torch.rand((), generator=generator, dtype=torch.float64).item(), 1e-300)
    return math.log(d * v) + math.log(u) / concentration
