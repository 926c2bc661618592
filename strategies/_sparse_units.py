"""Units with an age, and sparse connections between them: selection, rewiring, freezing.

Layer l turns the units of layer l - 1 into its own; layer 0 are the inputs. A unit of age 0 is in the plastic pool, 1
belongs to the running experience, k + 1 took part in the one k experiences ago. Connections of convolutions are whole
kernels.

Shape legend: O units of a layer, I columns of its weights (inputs of a unit).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones import Backbone
from cl.core import UserError

INPUT_AGE = 99
"""Inputs are neither plastic nor frozen by age."""


class SparseUnits:
    """Ages and connections of a backbone's stages.

    Attributes:
        ages: of the units of each layer, the inputs' first.
        masks: bool (O, I) of each layer, which connections exist.
    """

    def __init__(self) -> None:
        self.ages: list[Tensor] = []
        self.masks: list[Tensor] = []

    def pruned(self, layers: Sequence[nn.Linear | nn.Conv2d], prune: float, generator: torch.Generator) -> None:
        """Start: all units plastic, a random part of the connections removed; a first convolution is left whole."""
        inputs = layers[0].weight.shape[1]
        device = layers[0].weight.device
        self.ages = [torch.full((inputs,), INPUT_AGE, device=device)]
        self.masks = []
        for number, layer in enumerate(layers):
            keeps = torch.rand(layer.weight.shape[:2], generator=generator) >= prune
            if number == 0 and isinstance(layer, nn.Conv2d):
                keeps = torch.ones_like(keeps)
            self.masks.append(keeps.to(device))
            self.ages.append(torch.zeros(layer.weight.shape[0], dtype=torch.int64, device=device))
        self.apply(layers)

    def apply(self, layers: Sequence[nn.Linear | nn.Conv2d]) -> None:
        """Weights of connections that do not exist become zero."""
        with torch.no_grad():
            for layer, mask in zip(layers, self.masks, strict=True):
                layer.weight.masked_fill_(~as_weights(mask, layer.weight), 0.0)

    def select(self, activations: Sequence[Tensor], share: float) -> None:
        """Give the fewest units that carry a share of each layer's activation to the running experience (step 2).

        Args:
            activations: outputs (B, O, ...) of each layer on rows of the running experience.
        """
        for ages_O, outputs in zip(self.ages[1:], activations, strict=True):
            chosen_O = top_units(outputs.transpose(0, 1).flatten(1).sum(1), share)
            is_free_O = ages_O <= 1
            ages_O[is_free_O & chosen_O] = 1
            ages_O[is_free_O & ~chosen_O] = 0

    def sources(self, number: int) -> Tensor:
        """Age of the unit behind each column of layer `number` (from 0); a flattened map has many columns a unit."""
        ages, columns = self.ages[number], self.masks[number].shape[1]
        return ages.repeat_interleave(columns // len(ages))

    def drop(self) -> list[int]:
        """Remove what leads from the plastic pool to any other unit (step 3); how many connections of each layer."""
        dropped = []
        for number, mask in enumerate(self.masks):
            is_loose = (self.sources(number) == 0)[None, :] & (self.ages[number + 1] != 0)[:, None] & mask
            mask &= ~is_loose
            dropped.append(int(is_loose.sum()))
        return dropped

    def grow(
        self, layers: Sequence[nn.Linear | nn.Conv2d], counts: Sequence[int], generator: torch.Generator
    ) -> list[int]:
        """Add connections at random from any unit to the plastic pool, with weight 0 (step 4).

        Returns:
            how many of each layer found no place.
        """
        left = []
        for number, (layer, mask, count) in enumerate(zip(layers, self.masks, counts, strict=True)):
            is_open = ~mask & (self.ages[number + 1] == 0)[:, None]
            places = is_open.flatten().nonzero().squeeze(1)
            some = places[torch.randperm(len(places), generator=generator).to(places.device)[:count]]
            mask.view(-1)[some] = True
            with torch.no_grad():
                layer.weight.view(*mask.shape, -1)[some // mask.shape[1], some % mask.shape[1]] = 0.0
            left.append(count - len(some))
        return left

    def promote(self) -> None:
        """An experience is over: who took part grows older (step 6)."""
        for ages in self.ages[1:]:
            ages += (ages != 0).long()

    def frozen(self, cut: int, num_recent: int) -> list[Tensor]:
        """Units (O,) of each layer whose incoming weights stay: those before the cut right after their experience,
        the others once their experience is no longer replayed."""
        return [ages > (1 if number < cut else num_recent + 1) for number, ages in enumerate(self.ages[1:])]

    def reinitialise(self, layers: Sequence[nn.Linear | nn.Conv2d], generator: torch.Generator) -> None:
        """Draw the incoming weights of the plastic pool anew: He's normal for what leaves a unit, biases zero."""
        with torch.no_grad():
            for layer, ages in zip(layers, self.ages[1:], strict=True):
                is_plastic = ages == 0
                fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
                drawn = torch.randn(layer.weight.shape, generator=generator).to(layer.weight) * (2 / fan_out) ** 0.5
                layer.weight[is_plastic] = drawn[is_plastic]
                if layer.bias is not None:
                    layer.bias[is_plastic] = 0.0
        self.apply(layers)

    def state_dict(self) -> dict[str, Any]:
        return {"ages": list(self.ages), "masks": list(self.masks)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        # copies, because both are written in place
        self.ages = [ages.clone() for ages in saved["ages"]]
        self.masks = [mask.clone() for mask in saved["masks"]]


def top_units(total_O: Tensor, share: float) -> Tensor:
    """The smallest set of units, as bool (O,), whose sum reaches a share of all.

    Example:
        >>> top_units(torch.tensor([1.0, 6.0, 3.0]), 0.85).tolist()
        [False, True, True]
    """
    order = total_O.argsort(descending=True)
    before = total_O[order].cumsum(0) - total_O[order]
    chosen = torch.zeros(len(total_O), dtype=torch.bool, device=total_O.device)
    chosen[order[before < share * total_O.sum()]] = True
    # where nothing is active, somebody has to begin
    chosen[order[:1]] = True
    return chosen


def as_weights(mask_OI: Tensor, weight: Tensor) -> Tensor:
    """A mask of connections in the shape of the weights."""
    return mask_OI.view(*mask_OI.shape, *[1] * (weight.dim() - 2)).expand_as(weight)


def layers_of(backbone: Backbone, strategy: str) -> list[nn.Linear | nn.Conv2d]:
    """The weights of each stage.

    Raises:
        UserError: a stage that is not one linear or convolutional layer.
    """
    layers = []
    for number, stage in enumerate(backbone.stages(), 1):
        owners = {id(m): m for module in stage.modules for m in module.modules() if list(m.parameters(recurse=False))}
        found = list(owners.values())
        if len(found) != 1 or not isinstance(found[0], nn.Linear | nn.Conv2d) or getattr(found[0], "groups", 1) != 1:
            kinds = ", ".join(type(m).__name__ for m in found) or "nothing"
            raise UserError(
                f"{strategy} rewires stages of one linear or convolutional layer each, as those of mlp and convnet; "
                f"stage {number} of {type(backbone).__name__} has {kinds}"
            )
        layers.append(found[0])
    return layers
