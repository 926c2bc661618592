"""Trained parameters that no projection protects: let them go, or freeze them after the first experience."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cl.state import TrainState
from strategies._layer_inputs import Layers
from strategies._quadratic import Vectors, copied


class Unprotected:
    """Parameters of no layer that is held, and of no head of a single task; with them running statistics.

    Attributes:
        frozen: their values, by name; empty while they may move.
    """

    def __init__(self) -> None:
        self.frozen: Vectors = {}

    def freeze(self, state: TrainState, layers: Layers) -> None:
        """They stay what they are now, beside the layers that are held."""
        protected = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
        named = {name: p for name, p in state.parameters().items() if id(p) not in protected}
        self.frozen = {name: p.detach().clone() for name, p in named.items() if ".heads." not in f".{name}"}

    def hold_statistics(self, state: TrainState) -> None:
        """Before a batch."""
        self._set_norms(state.model, False)

    def release_statistics(self, state: TrainState) -> None:
        """Modes as they were, when an experience has ended."""
        self._set_norms(state.model, state.model.training)

    def _set_norms(self, model: nn.Module, is_training: bool) -> None:
        for module in model.modules() if self.frozen else ():
            if isinstance(module, _NormBase):
                module.train(is_training)

    @torch.no_grad()
    def put_back(self, state: TrainState) -> None:
        """After an update, whatever it changed."""
        parameters = state.parameters() if self.frozen else {}
        for name, value in self.frozen.items():
            parameters[name].copy_(value)

    def to(self, device: torch.device) -> None:
        self.frozen = {name: each.to(device) for name, each in self.frozen.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.frozen = copied(saved)
