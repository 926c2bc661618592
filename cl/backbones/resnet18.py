"""ResNet-18 for small images: a 3x3 stem without max-pooling, so that 32x32 pixels reach the last block as 4x4.

Source: He et al., "Deep Residual Learning", 2016; slim form with 20 channels from Lopez-Paz & Ranzato, "Gradient
Episodic Memory", 2017. Differences: none for 32x32 images in colour; other sizes and channels work, since the last
pooling takes whatever is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import Backbone, Stage, channels_last, require_image, require_width
from cl.core import StreamInfo

STRIDES = (1, 2, 2, 2)
"""Of the four stages of two blocks each; every stage has twice the channels of the one before."""

NARROWEST_LAST = 8
"""Channels of the first stage from which on the channels of a pixel lie side by side."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input (through a 1x1 convolution where shapes differ)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class Resnet18(Backbone):
    """Stem, four stages of two blocks, global average, head.

    Args:
        width: channels of the first stage (`nf` in mammoth and GEM): 20 for the slim network, 64 for the full one.
        head: "linear", or "weight_norm" for weights of length 1 without biases.

    Raises:
        UserError: a value outside its range, or rows that are no images.

    Cost: 55 million multiply-adds a row of 32x32 pixels at width 20, 555 million at 64.
    """

    def __init__(self, info: StreamInfo, width: int = 20, head: str = "linear") -> None:
        channels, _, _ = require_image(info, "resnet18")
        require_width("width", width)
        super().__init__(info, 8 * width, head)
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        width_in = width
        for stage, stride in enumerate(STRIDES):
            wide = width * 2**stage
            blocks += [BasicBlock(width_in, wide, stride), BasicBlock(wide, wide, 1)]
            width_in = wide
        self.blocks = nn.Sequential(*blocks)

    def stages(self) -> Sequence[Stage]:
        """The stem, eight blocks, the average."""
        blocks = [Stage(block, (block,)) for block in self.blocks]
        return [Stage(self._stem, (self.conv, self.bn)), *blocks, Stage(_average, ())]

    def _stem(self, inputs: Tensor) -> Tensor:
        # stages of fewer channels ended the process in this layout, in the backward pass on a CPU with AVX2 alone
        inputs = channels_last(inputs) if self.conv.out_channels >= NARROWEST_LAST else inputs
        return F.relu(self.bn(self.conv(inputs)))


def _average(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))
