"""A network under relevance maps: every experience sees the weights that are relevant to it, and no others.

    W_k = W * M_k,   M_k = 1 where A > 0                    dM / dA is that of sigmoid(sharpness * A)

Shape legend: K maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl.backbones import MultiHead
from cl.core import Batch, Output
from strategies._layer_inputs import find_layers


class RelevanceNet(nn.Module):
    """A backbone whose layers are masked by the map in use; heads of single tasks are not.

    Args:
        num_maps: K, how many there can be.
        sharpness: of the sigmoid that stands for the step of a map.

    Attributes:
        active: number of the map in use; `is_open` while it is being learnt.
    """

    def __init__(self, backbone: nn.Module, num_maps: int, sharpness: float, strategy: str) -> None:
        super().__init__()
        self.backbone, self.sharpness = backbone, sharpness
        layers = find_layers(backbone, strategy)
        self.names = [f"{layer}.{key}" for layer, module in layers.items() for key, _ in module.named_parameters()]
        self.scores = nn.ParameterList(torch.zeros_like(weight) for weight in self.weights())
        for number, weight in enumerate(self.weights()):
            self.register_buffer(f"maps_{number}", torch.zeros(num_maps, *weight.shape, dtype=torch.bool))
        self.active, self.is_open = 0, True

    def weights(self) -> list[nn.Parameter]:
        parameters = dict(self.backbone.named_parameters())
        return [parameters[name] for name in self.names]

    def maps(self, number: int) -> Tensor:
        """(K, ...) the finished maps of a weight."""
        found: Tensor = getattr(self, f"maps_{number}")
        return found

    def frozen(self) -> list[Tensor]:
        """Of each weight, where a finished map needs it."""
        return [self.maps(number).any(0) for number in range(len(self.names))]

    def heads(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Weights of the heads of single tasks, each with the number of the task."""
        for module in self.backbone.modules():
            if isinstance(module, MultiHead):
                yield from ((task, p) for task, head in enumerate(module.heads) for p in head.parameters())

    def redraw(self, density: float, generator: torch.Generator) -> None:
        """Begin a map: a random share of the weights is relevant, each by an even chance of little or much."""
        with torch.no_grad():
            for score in self.scores:
                drawn = torch.rand(score.shape, generator=generator).to(score)
                score.copy_((drawn + density - 1) * SPREAD)
        self.is_open = True

    def finish(self) -> None:
        """The map in use stays as it is from now on."""
        with torch.no_grad():
            for number, score in enumerate(self.scores):
                self.maps(number)[self.active] = score > 0
        self.is_open = False

    def masked(self, which: int) -> dict[str, Tensor]:
        """Weights by name, as map `which` shows them."""
        shown = {}
        for number, (name, weight) in enumerate(zip(self.names, self.weights(), strict=True)):
            if self.is_open and which == self.active:
                score = self.scores[number]
                soft = torch.sigmoid(self.sharpness * score)
                shown[name] = weight * ((score > 0).to(weight.dtype) + soft - soft.detach())
            else:
                shown[name] = weight * self.maps(number)[which]
        return shown

    def forward(self, batch: Batch, *args: Any, which: int | None = None) -> Output:
        masked = self.masked(self.active if which is None else which)
        output: Output = functional_call(self.backbone, masked, (batch, *args))
        return output


SPREAD = 0.2
"""Width of the range that scores are drawn from."""
