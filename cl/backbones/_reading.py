"""How rows of a stream become a sequence of vectors: tokens, rows of an image, pixels, or vectors as they are.

Shape legend: B rows, T steps, D width, F width of a step's input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.core import Setting, StreamInfo, UserError

READS = ("rows", "pixels")


def first_layer(info: StreamInfo, width: int, read: str, backbone: str) -> nn.Module:
    """An embedding of tokens, or a linear map of the vector that each step shows.

    Args:
        read: rows or pixels; of images only.

    Raises:
        UserError: rows that are neither text nor images nor sequences of vectors, or an unknown `read`.
    """
    if read not in READS:
        raise UserError(f"backbone.read is {read!r}; it must be one of {', '.join(READS)}")
    if info.setting == Setting.CONTINUAL_PRETRAINING:
        require_tokens(info, backbone)
        return nn.Embedding(info.num_outputs, width)
    shape = info.input_shape
    if len(shape) not in (2, 3):
        raise UserError(
            f"backbone {backbone} reads rows of tokens, images (channels, height, width) or sequences (steps, width); "
            f"the rows of {info.name} have the shape {tuple(shape)}"
        )
    if len(shape) == 2:
        return nn.Linear(shape[1], width)
    return nn.Linear(shape[0] * (shape[2] if read == "rows" else 1), width)


def steps_of(inputs: Tensor, read: str) -> Tensor:
    """(B, T, F) vectors in the order they are read; tokens (B, T) stay as they are.

    An image (channels, height, width) is read from the top row of pixels to the bottom one, each channels * width
    numbers, or pixel by pixel, each `channels` numbers.

    Example:
        >>> image = torch.arange(6.0).view(1, 1, 3, 2)
        >>> steps_of(image, "rows").tolist(), steps_of(image, "pixels").shape
        ([[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]], torch.Size([1, 6, 1]))
    """
    if inputs.dim() < 4:
        return inputs
    return inputs.transpose(1, 2).flatten(2) if read == "rows" else inputs.flatten(2).transpose(1, 2)


def num_steps(info: StreamInfo, read: str) -> int:
    """Steps of a row in the order it is read: T."""
    if len(info.input_shape) < 3:
        return info.input_shape[0]
    return info.input_shape[1] * (info.input_shape[2] if read == "pixels" else 1)


def require_tokens(info: StreamInfo, backbone: str) -> None:
    """Whether rows are text.

    Raises:
        UserError: they are not.
    """
    if info.setting != Setting.CONTINUAL_PRETRAINING or len(info.input_shape) != 1:
        raise UserError(
            f"backbone {backbone} reads rows of tokens, such as those of stream=builtin_text; the rows of {info.name} "
            f"have the shape {tuple(info.input_shape)} in the {info.setting} setting"
        )


def draw(module: nn.Module, num_blocks: int, deviation: float = 0.02) -> None:
    """Initial weights of GPT-2: normal, biases zero, those that write into the residual stream smaller.

    Modules with a method `initialise` are asked last, for what must start otherwise.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, p in module.named_parameters():
        if name.endswith(".out.weight"):
            nn.init.normal_(p, std=deviation / (2 * num_blocks) ** 0.5)
    for part in module.modules():
        if callable(initialise := getattr(part, "initialise", None)):
            with torch.no_grad():
                initialise()
