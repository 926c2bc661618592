"""Strong random changes of stored images, as uint8: torchvision's policies and a fast turn-and-shift.

Shape legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streams._turned import turned

MAX_ANGLE, MAX_SHIFT_FRAC = 15.0, 0.1
"""Of `turn_and_shift`: degrees either way, and the share of the side that an image moves by."""


def turn_and_shift(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 15 degrees and shift by up to a tenth of the side; what comes in is black. All images at once."""
    N, _, H, W = images_NCHW.shape
    angles = (2 * torch.rand(N, generator=generator, dtype=torch.float64) - 1) * MAX_ANGLE
    reach = max(1, round(MAX_SHIFT_FRAC * max(H, W)))
    shifts = torch.randint(-reach, reach + 1, (2, N), generator=generator)
    images = turned(images_NCHW.cpu(), angles)
    rows = torch.arange(H).view(1, H, 1) - shifts[0].view(N, 1, 1)
    columns = torch.arange(W).view(1, 1, W) - shifts[1].view(N, 1, 1)
    is_inside = (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
    moved = images[torch.arange(N).view(N, 1, 1), :, rows.clamp(0, H - 1), columns.clamp(0, W - 1)]
    return (moved.permute(0, 3, 1, 2) * is_inside.unsqueeze(1)).to(images_NCHW.device)


def auto_augment(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """torchvision's AutoAugment with the CIFAR-10 policy, image by image."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    return _each(AutoAugment(AutoAugmentPolicy.CIFAR10), images_NCHW, generator)


def rand_augment(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """torchvision's RandAugment, two operations of magnitude 9 of 31, image by image."""
    from torchvision.transforms import RandAugment

    return _each(RandAugment(), images_NCHW, generator)


def _each(policy: Any, images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """A policy of torchvision on every image; it can draw from the global generator only, lent and put back."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([policy(image) for image in images_NCHW])


STRONG: dict[str, Callable[[Tensor, torch.Generator], Tensor] | None] = {
    "auto_augment": auto_augment,
    "rand_augment": rand_augment,
    "turn_and_shift": turn_and_shift,
    "none": None,
}
