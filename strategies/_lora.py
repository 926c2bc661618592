"""Low-rank adapters as peft puts them into a model: finding them, adding them to the weights, beginning anew.

    W = W_0 + s B A,  A (r, d_in), B (d_out, r), s = alpha / r

Any model that holds plain LoRA layers of peft will do; here that is `backbone=hf` or `gpt` with `backbone.lora`.
Layers are known by what they have, so that nothing here needs peft to be installed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.core import StreamInfo, UserError
from cl.hooks import Strategy
from cl.state import TrainState
from strategies._quadratic import Quadratic
from strategies.lwf import Lwf


@dataclass(frozen=True)
class Pair:
    """The adapter that is trained in one layer."""

    layer: Any
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """(r, d_in); (r, number of tokens) of an embedding."""
        found = self.layer.lora_embedding_A if self._is_embedding else self.layer.lora_A
        return found[self.adapter] if self._is_embedding else found[self.adapter].weight

    @property
    def b(self) -> nn.Parameter:
        """(d_out, r)."""
        found = self.layer.lora_embedding_B if self._is_embedding else self.layer.lora_B
        return found[self.adapter] if self._is_embedding else found[self.adapter].weight

    @property
    def _is_embedding(self) -> bool:
        return self.adapter in self.layer.lora_embedding_A

    def change(self) -> Tensor:
        """(d_out, d_in) s B A, with its gradient."""
        return self.layer.scaling[self.adapter] * (self.b @ self.a)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight that it adapts, which leaves the model as it was once the adapter is empty."""
        weight = self.layer.get_base_layer().weight
        change = self.change().to(weight.dtype)
        # some layers, and embeddings, keep their weight as (d_in, d_out)
        weight += change.T if self._is_embedding or getattr(self.layer, "fan_in_fan_out", False) else change

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """A as torch draws linear layers, B zero, so that nothing changes yet; of an embedding the other way round."""
        drawn, zero = (self.b, self.a) if self._is_embedding else (self.a, self.b)
        if self._is_embedding:
            drawn.copy_(torch.randn(drawn.shape, generator=generator))
        else:
            reach = 1 / math.sqrt(drawn.shape[1])
            drawn.copy_((2 * torch.rand(drawn.shape, generator=generator) - 1) * reach)
        zero.zero_()


def pairs(model: nn.Module) -> dict[str, Pair]:
    """Every layer's adapter by the layer's name; empty for a model without any."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "lora_embedding_A") and hasattr(layer, "active_adapters"):
            for adapter in layer.active_adapters[:1]:
                if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    found[name] = Pair(layer, adapter)
    return found


class LoraStrategy(Strategy):
    """A strategy for models that are trained through adapters.

    Attributes:
        merges: it adds adapters to the weights that they adapt.
    """

    merges = False

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        """Where adapters are added to the weights and begin anew, what others have kept of them says nothing any more.

        Raises:
            UserError: such another strategy, or one that would copy the model before that.
        """
        place = list(strategies).index(self)
        for number, other in enumerate(strategies if self.merges else ()):
            if isinstance(other, LoraStrategy | Quadratic) and other is not self:
                raise UserError(
                    f"{self.name} adds its adapters to the weights after each experience and begins new ones, and "
                    f"{other.name} goes by the old ones; leave one of the two out"
                )
            if isinstance(other, Lwf) and number < place:
                raise UserError(
                    f"{other.name} copies the adapters before {self.name} adds them to the weights; put {self.name} "
                    f"first, as in strategy=[{self.name},{other.name}]"
                )

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        found = pairs(model)
        if self.merges:
            self._require_own_weights(model, found)
            self._require_whole_weights(found)
        if not found:
            raise UserError(
                f"{self.name} works on LoRA adapters, and {type(model).__name__} has none; take backbone=hf or gpt "
                "with 'backbone.lora={rank: 8}'"
            )

    def _require_own_weights(self, model: nn.Module, found: dict[str, Pair]) -> None:
        """An adapter that is added to a weight which another layer reads too changes that layer as well."""
        readers = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        for name, pair in found.items():
            if readers[id(pair.layer.get_base_layer().weight)] > 1:
                raise UserError(
                    f"{self.name} adds adapters to the weights that they adapt, and {name} shares its weight with "
                    "another layer; leave it out of backbone.lora.target_modules"
                )

    def _require_whole_weights(self, found: dict[str, Pair]) -> None:
        """Of an adapter that is added to weights in half precision, most would be rounded away."""
        for dtype in {pair.layer.get_base_layer().weight.dtype for pair in found.values()}:
            if dtype.itemsize < 4:
                raise UserError(
                    f"{self.name} adds adapters to the weights that they adapt, and backbone.dtype is "
                    f"{str(dtype).removeprefix('torch.')!r}, which would round much of them away; it must be float32"
                )

    def begin_anew(self, state: TrainState) -> None:
        """Merge every adapter and let it begin anew, for the optimizer as well."""
        for pair in pairs(state.model).values():
            pair.merge()
            pair.restart(state.seeds.named(self.name))
            forget(state.optimizer, (pair.a, pair.b))


def forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """What the optimizer remembers of some parameters."""
    for p in parameters:
        optimizer.state.pop(p, None)


def summed(terms: Iterable[Tensor]) -> Tensor:
    """Sum of scalars; at least one."""
    first, *others = terms
    return sum(others, start=first)


Measure = Callable[[Tensor], Tensor]
MEASURES: dict[str, Measure] = {"absolute": torch.abs, "squared": torch.square}
