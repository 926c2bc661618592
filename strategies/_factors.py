"""A frozen network with low-rank factors beside the weights of its layers.

    W + B A,   A (rank, D) random,  B (O, rank) zero at first

Shape legend: O units, D inputs of a unit (of a convolution, all of its patch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl.core import Batch, Output
from strategies._layer_inputs import find_layers
from strategies._modules import compute_once

Factors = dict[str, tuple[Tensor, Tensor]]
"""(B, A) of each weight, by its name."""


class FactorNet(nn.Module):
    """A backbone that is trained itself, or only by factors; heads of single tasks are always trained.

    Attributes:
        is_frozen: whether the network stands still and the factors learn.
    """

    def __init__(self, backbone: nn.Module, rank: int, strategy: str) -> None:
        super().__init__()
        self.backbone, self.is_frozen = backbone, False
        compute_once(backbone)
        layers = find_layers(backbone, strategy, others="train")
        self.names = [f"{name}.weight" for name in layers]
        weights = [layer.weight.detach().flatten(1) for layer in layers.values()]
        ranks = [min(rank, *weight.shape) for weight in weights]
        self.down = nn.ParameterList(w.new_zeros(rank, w.shape[1]) for rank, w in zip(ranks, weights, strict=True))
        self.up = nn.ParameterList(w.new_zeros(w.shape[0], rank) for rank, w in zip(ranks, weights, strict=True))
        of_one_task = ".heads."
        self.shared = [name for name, _ in backbone.named_parameters() if of_one_task not in f".{name}"]

    def redraw(self, generator: torch.Generator) -> None:
        """Factors of no effect: A uniform as in LoRA, B zero."""
        with torch.no_grad():
            for down, up in zip(self.down, self.up, strict=True):
                bound = down.shape[1] ** -0.5
                drawn = torch.rand(down.shape, generator=generator) * 2 - 1
                down.copy_(drawn.to(down) * bound)
                up.zero_()

    def factors(self) -> Factors:
        """A copy of the factors."""
        pairs = zip(self.up, self.down, strict=True)
        return dict(zip(self.names, ((up.detach().clone(), down.detach().clone()) for up, down in pairs), strict=True))

    def forward(self, batch: Batch, *args: Any) -> Output:
        if not self.is_frozen:
            plain: Output = self.backbone(batch, *args)
            return plain
        parameters = dict(self.backbone.named_parameters())
        shown: dict[str, Tensor] = {name: parameters[name].detach() for name in self.shared}
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            shown[name] = shown[name] + (up @ down).view_as(shown[name])
        output: Output = functional_call(self.backbone, shown, (batch, *args))
        return output
