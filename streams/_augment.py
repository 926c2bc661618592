"""Random changes of training images, a whole batch in a few tensor operations.

Shape legend: B rows, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

CROP_PADDING = 4


def crop(inputs_BCHW: Tensor, generator: torch.Generator, fill: Tensor, flip: bool = False) -> Tensor:
    """Shift every image by up to 4 pixels each way, and mirror half of them if `flip`.

    The same as torchvision's `RandomCrop(size, padding=4)` and `RandomHorizontalFlip` before normalisation.

    Args:
        fill: (1, C, 1, 1) value of a black pixel after the transform, for what is shifted in.
        generator: on the CPU; an image's draw does not depend on the device.
    """
    B, C, H, W = inputs_BCHW.shape
    device, margin = inputs_BCHW.device, CROP_PADDING
    offsets = torch.randint(2 * margin + 1, (2, B), generator=generator)
    mirrored = torch.randint(2, (B,), generator=generator).bool() if flip else torch.zeros(B, dtype=torch.bool)
    padded = fill.to(device).expand(B, C, H + 2 * margin, W + 2 * margin).clone()
    padded[:, :, margin:-margin, margin:-margin] = inputs_BCHW
    rows_BH = offsets[0, :, None] + torch.arange(H)
    columns_W = torch.arange(W)
    columns_BW = offsets[1, :, None] + torch.where(mirrored[:, None], columns_W.flip(0), columns_W)
    where_BP = (rows_BH[:, :, None] * (W + 2 * margin) + columns_BW[:, None, :]).flatten(1)
    index = where_BP.to(device)[:, None].expand(B, C, H * W)
    return padded.flatten(2).gather(2, index).view(B, C, H, W)


AUGMENTS: dict[str, Callable[..., Tensor] | None] = {"none": None, "crop": crop, "crop_flip": partial(crop, flip=True)}
