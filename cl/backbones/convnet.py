"""The small convolutional network of the MNIST protocols.

Source: the MNIST network of SCoLe (Lesort et al., 2023), two 5x5 convolutions of 10 and 20 channels and one layer of
50 units; with images of 28x28 pixels it has the same 21,840 weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import Backbone, Stage, channels_last, require_image, require_width
from cl.core import StreamInfo, UserError

KERNEL = 5
UNPADDED_FROM = 16
"""Smallest image of which two unpadded convolutions with pooling leave a pixel."""


class Convnet(Backbone):
    """Twice convolution, 2x2 max-pooling and ReLU, then one hidden layer with ReLU, then the head.

    Convolutions are unpadded, as published. Images with a side below 16 pixels (the 8x8 digits), of which nothing would
    be left, are padded so that convolutions keep the size.

    Args:
        channels: of the two convolutions.
        hidden: width of the layer under the head.
        head: "linear", or "weight_norm" for weights of length 1 without biases.

    Raises:
        UserError: a value outside its range, rows that are no images, or images below 4x4 pixels.
    """

    def __init__(
        self, info: StreamInfo, channels: Sequence[int] = (10, 20), hidden: int = 50, head: str = "linear"
    ) -> None:
        depth, height, width = require_image(info, "convnet", smallest=4)
        require_width("hidden", hidden)
        if not isinstance(channels, Sequence) or len(channels) != 2:
            raise UserError(f"backbone.channels is {channels!r}; it must be a list of two integers, such as [10,20]")
        for count in channels:
            require_width("channels", count)
        super().__init__(info, hidden, head)
        padding = KERNEL // 2 if min(height, width) < UNPADDED_FROM else 0
        self.conv1 = nn.Conv2d(depth, channels[0], KERNEL, padding=padding)
        self.conv2 = nn.Conv2d(channels[0], channels[1], KERNEL, padding=padding)
        self.fc = nn.Linear(channels[1] * _left(height, padding) * _left(width, padding), hidden)

    def stages(self) -> Sequence[Stage]:
        return (
            Stage(self._first, (self.conv1,)),
            Stage(self._second, (self.conv2,)),
            Stage(self._third, (self.fc,)),
        )

    def _first(self, inputs: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.conv1(channels_last(inputs)), 2))

    def _second(self, hidden: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.conv2(hidden), 2))

    def _third(self, hidden: Tensor) -> Tensor:
        return F.relu(self.fc(hidden.flatten(1)))


def _left(size: int, padding: int) -> int:
    """Pixels of a side after both convolutions and poolings."""
    for _ in range(2):
        size = (size + 2 * padding - KERNEL + 1) // 2
    return size
