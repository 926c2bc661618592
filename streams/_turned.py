"""Turn every image of a batch by its own angle; `streams.rotated` turns all by the same."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2000
"""Images at a time: their source pixels are held in float64."""


def turned(inputs_NCHW: Tensor, angles_N: Tensor) -> Tensor:
    """Images turned counter-clockwise about their centre; nearest source pixel, 0 outside, as PIL's `Image.rotate`.

    Args:
        inputs_NCHW: uint8.
        angles_N: degrees, float64.

    Example:
        >>> turned(torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8), torch.tensor([90.0])).flatten().tolist()
        [2, 4, 1, 3]
    """
    parts = zip(inputs_NCHW.split(CHUNK), angles_N.double().split(CHUNK), strict=True)
    return torch.cat([_turned(images, angles) for images, angles in parts])


def _turned(inputs_NCHW: Tensor, angles_N: Tensor) -> Tensor:
    N, C, H, W = inputs_NCHW.shape
    radians = torch.deg2rad(angles_N).view(N, 1, 1)
    # rounded as in PIL, so that right angles stay exact
    cos, sin = radians.cos().round(decimals=15), radians.sin().round(decimals=15)
    y_H1 = torch.arange(H, dtype=torch.float64).unsqueeze(1) + 0.5 - H / 2
    x_W = torch.arange(W, dtype=torch.float64) + 0.5 - W / 2
    from_x = (cos * x_W - sin * y_H1 + W / 2).floor().long()
    from_y = (sin * x_W + cos * y_H1 + H / 2).floor().long()
    is_inside = (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    source = (from_y * W + from_x).where(is_inside, 0).view(N, 1, H * W).expand(N, C, H * W)
    pixels = inputs_NCHW.reshape(N, C, H * W).gather(2, source)
    return (pixels * is_inside.view(N, 1, H * W)).view(N, C, H, W)
