"""Multi-layer perceptron with ReLU, the usual network of the MNIST protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from cl.backbones.heads import Backbone
from cl.core import StreamInfo


class Mlp(Backbone):
    """Flatten, then `hidden` layers with ReLU, then the head.

    Args:
        hidden: widths of the hidden layers.
        init: "torch" for torch's default, "xavier" for uniform Xavier weights and zero biases (mammoth's MNIST MLP).

    Cost: about 2 * sum(width_in * width_out) multiply-adds a row.
    """

    def __init__(self, info: StreamInfo, hidden: Sequence[int] = (256, 256), init: str = "torch") -> None:
        widths = [math.prod(info.input_shape), *hidden]
        super().__init__(info, widths[-1])
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        if init not in ("torch", "xavier"):
            raise ValueError(f"backbone.init is {init!r}; it must be torch or xavier")
        if init == "xavier":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def features(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.body(inputs)
        return hidden
