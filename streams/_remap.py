"""Move the pixels of many images at once: what permutations and rotations by the nearest pixel have in common."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def remap(inputs: Tensor, source: Tensor) -> Tensor:
    """Pixel p of every result is pixel `source[p]` of its image, or 0 where that is -1.

    Args:
        inputs: (N, channels, height, width) uint8.
        source: (P,) int64, P pixels of all channels, or of one channel and then the same for each.

    Cost: one pass over the images. numpy's `take` because torch's `index_select` needs 5 times as long for bytes.

    Example:
        >>> remap(torch.tensor([[[[7, 8]]]], dtype=torch.uint8), torch.tensor([1, -1])).flatten().tolist()
        [8, 0]
    """
    outside = source < 0
    flat = inputs.reshape(-1, len(source)).numpy()
    moved = np.take(flat, source.where(~outside, 0).numpy(), axis=1)
    if outside.any():
        moved *= (~outside).to(torch.uint8).numpy()
    return torch.from_numpy(moved).view(inputs.shape)
