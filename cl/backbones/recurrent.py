"""LSTM or GRU that reads an image row by row (sequential MNIST), or any rows of vectors.

Shape legend: B rows of a batch, T steps, D width of a step's input, F units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.backbones._heads import Backbone, require_width
from cl.core import StreamInfo, UserError

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(Backbone):
    """Recurrent layers from the top row of pixels to the bottom one; the head reads the last output.

    An image (channels, height, width) is height steps of channels * width pixels; rows (T, D) are T steps.

    Args:
        kind: lstm or gru.
        hidden: units of a layer.
        num_layers: layers on top of each other.

    Raises:
        UserError: a value outside its range, or rows that are neither images nor sequences of vectors.
    """

    def __init__(self, info: StreamInfo, kind: str = "lstm", hidden: int = 128, num_layers: int = 1) -> None:
        if kind not in KINDS:
            raise UserError(f"backbone.kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        require_width("hidden", hidden)
        require_width("num_layers", num_layers)
        if len(info.input_shape) not in (2, 3):
            raise UserError(
                "backbone recurrent reads images (channels, height, width) or sequences (steps, width); the rows of "
                f"{info.name} have the shape {tuple(info.input_shape)}"
            )
        super().__init__(info, hidden)
        *channels, _, width = info.input_shape
        self.layers = KINDS[kind](width * (channels[0] if channels else 1), hidden, num_layers, batch_first=True)

    def features(self, inputs: Tensor) -> Tensor:
        steps_BTD = inputs.transpose(1, 2).flatten(2) if inputs.dim() == 4 else inputs
        # on a CPU without instructions for bfloat16 torch's LSTM fails under autocast, so on CPUs it is left out
        with torch.autocast("cpu", enabled=False):
            outputs_BTF, _ = self.layers(steps_BTD.to(self.layers.weight_ih_l0.dtype))
        last_BF: Tensor = outputs_BTF[:, -1]
        return last_BF
