"""Perturbations of images: noise, blur, contrast, brightness and saturation in five severities.

An experience of SCoLe may show all its images through one of them, drawn at random; measured is on clean images.

    gaussian_noise   x + s n                        contrast     mean + s (x - mean), of each image's channel
    shot_noise       Poisson(s x) / s               brightness   V + s of hue, saturation and value
    impulse_noise    a share s black or white       saturate     S a + b of hue, saturation and value; colour only
    speckle_noise    x + s x n                      zoom_blur    mean of x and of x enlarged by 1, 1.01, ..., s
    gaussian_blur    Gaussian of s pixels           defocus_blur mean over a disk of s pixels, smoothed by b

x in [0, 1], n standard normal; results are clipped and rounded to the stored levels.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019, with the constants for images of 64 pixels, as in TLESORT/SCoLe-SCaling-Continual-Learning
(perturbations/utils_perturbations.py).
Differences: all images of an experience at once, drawn when it is loaded, so that every epoch sees the same noise;
values are rounded, not cut off; motion blur, fog, snow, spatter, elastic transform and glass blur, which need
ImageMagick or OpenCV or fixed sides of 64 pixels there, are left out.

Shape legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES = 5


def perturbed(raw_NCHW: Tensor, kind: str, severity: int, generator: torch.Generator, largest: int = 255) -> Tensor:
    """Stored images through one perturbation.

    Args:
        raw_NCHW: uint8.
        kind: one of `kinds_for` the channels, or "none".
        severity: from 1 to 5.
        generator: on the CPU; used by noise alone.
        largest: stored value that is white.

    Cost: one pass over the images in float32; `zoom_blur` six to seventeen.
    """
    if kind == "none":
        return raw_NCHW
    changed = PERTURBATIONS[kind](raw_NCHW.float() / largest, severity - 1, generator)
    return (changed.clamp(0, 1) * largest).round().to(torch.uint8)


def kinds_for(channels: int) -> tuple[str, ...]:
    """What can be done to such images, "none" first; grey ones have no saturation."""
    return "none", *(kind for kind in PERTURBATIONS if kind != "saturate" or channels == 3)


def gaussian_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.04, 0.08, 0.12, 0.15, 0.18)[level] * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    scale = (250, 100, 50, 30, 15)[level]
    return torch.poisson(x * scale, generator=generator) / scale


def impulse_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    share = (0.01, 0.02, 0.05, 0.08, 0.14)[level]
    drawn = torch.rand(x.shape, generator=generator)
    return x.masked_fill(drawn < share, 0.0).masked_fill(drawn < share / 2, 1.0)


def speckle_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.15, 0.2, 0.25, 0.3, 0.35)[level] * x * torch.randn(x.shape, generator=generator)


def gaussian_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from scipy.ndimage import gaussian_filter

    sigma = (0.5, 0.75, 1.0, 1.25, 1.5)[level]
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def defocus_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    radius, smoothing = ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1))[level]
    kernel = disk(radius, smoothing)
    reach = len(kernel) // 2
    # OpenCV's border, as there: mirrored about the centre of the last pixel
    padded = F.pad(x.flatten(0, 1).unsqueeze(1), (reach,) * 4, mode="reflect")
    return F.conv2d(padded, kernel[None, None]).view_as(x)


def disk(radius: float, smoothing: float) -> Tensor:
    """Kernel of a blurred point: a disk of pixels whose centre is within the radius, smoothed by a 3x3 Gaussian.

    Example:
        >>> [round(weight, 3) for weight in disk(1, 0.1)[2].tolist()]
        [0.0, 0.2, 0.2, 0.2, 0.0]
    """
    reach = math.ceil(radius) + 1
    y, x = torch.meshgrid(*[torch.arange(-reach, reach + 1)] * 2, indexing="ij")
    points = (x**2 + y**2 <= radius**2).float()
    line = torch.exp(-(torch.arange(-1.0, 2.0) ** 2) / (2 * smoothing**2))
    line = line / line.sum()
    smooth = F.conv2d(points[None, None] / points.sum(), torch.outer(line, line)[None, None], padding=1)
    return smooth[0, 0]


def zoom_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    from scipy.ndimage import zoom

    stop, step = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))[level]
    H, W = x.shape[2:]
    factors = np.arange(1, stop, step)
    total = x.clone()
    for factor in factors:
        height, width = math.ceil(H / factor), math.ceil(W / factor)
        top, left = (H - height) // 2, (W - width) // 2
        part = x[:, :, top : top + height, left : left + width].numpy()
        large = torch.from_numpy(zoom(part, (1, 1, factor, factor), order=1))
        top, left = (large.shape[2] - H) // 2, (large.shape[3] - W) // 2
        total += large[:, :, top : top + H, left : left + W]
    return total / (len(factors) + 1)


def contrast(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (x - mean)


def brightness(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    value = x.amax(1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(max=1)
    # hue and saturation stay where all channels grow by one factor; black becomes grey
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


def saturate(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    factor, more = ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (30.0, 0.2))[level]
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    saturation = (value - least) / value.clamp(min=1e-6)
    wanted = (factor * saturation + more).clamp(max=1)
    # grey has the hue of red there
    hue = torch.where(
        saturation > 0, (value - x) / (value - least).clamp(min=1e-6), x.new_tensor([0, 1, 1])[:, None, None]
    )
    return value * (1 - wanted * hue)


PERTURBATIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    each.__name__: each
    for each in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        speckle_noise,
        gaussian_blur,
        defocus_blur,
        zoom_blur,
        contrast,
        brightness,
        saturate,
    )
}
"""By name: images in [0, 1], severity from 0, generator -> images, not yet clipped."""
