"""Multi-layer perceptron with ReLU, the usual network of the MNIST protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cl.backbones._heads import Backbone, Stage, require_width
from cl.core import StreamInfo, UserError


class Mlp(Backbone):
    """Flatten, then `hidden` layers with ReLU, then the head.

    Args:
        hidden: widths of the hidden layers; empty for a linear classifier.
        init: "torch" for torch's default, "xavier" for uniform Xavier weights and zero biases (mammoth's MNIST MLP).
        bias: False leaves out every bias, the head's too (the networks of GPM and HLOP).

    Raises:
        UserError: a value outside its range.

    Cost: sum(width_in * width_out) multiply-adds a row, forward; twice that again, backward.
    """

    def __init__(
        self, info: StreamInfo, hidden: Sequence[int] = (256, 256), init: str = "torch", bias: bool = True
    ) -> None:
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise UserError(f"backbone.hidden is {hidden!r}; it must be a list of widths, such as [256,256]")
        for width in hidden:
            require_width("hidden", width)
        if init not in ("torch", "xavier"):
            raise UserError(f"backbone.init is {init!r}; it must be torch or xavier")
        widths = [math.prod(info.input_shape), *hidden]
        super().__init__(info, widths[-1])
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        if init == "xavier":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        if not bias:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.register_parameter("bias", None)

    def features(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.body(inputs)
        return hidden

    def stages(self) -> Sequence[Stage]:
        """Every hidden layer with its ReLU; the first one flattens before."""
        if len(self.body) == 1:
            return (Stage(self.body[0], ()),)
        layers = [self.body[:3], *(self.body[low : low + 2] for low in range(3, len(self.body), 2))]
        return [Stage(layer, (layer,)) for layer in layers]
