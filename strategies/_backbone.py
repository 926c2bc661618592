"""Find the backbone inside a model, and keep a frozen copy of a model as a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl.backbones import Backbone
from cl.core import Batch, Output, UserError
from cl.state import TrainState, tensor_bytes
from strategies._modes import evaluation_mode
from strategies._quadratic import Vectors, copied, snapshot


def require_backbone(module: nn.Module, strategy: str, needs: str) -> Backbone:
    """The `cl.backbones.Backbone` inside a module.

    Args:
        needs: what the strategy takes from it, to complete "<strategy> needs a backbone with ...".

    Raises:
        UserError: there is none.
    """
    for inner in module.modules():
        if isinstance(inner, Backbone):
            return inner
    raise UserError(
        f"{strategy} needs a backbone with {needs}: a cl.backbones.Backbone, and {type(module).__name__} is none"
    )


def require_own_weights(module: nn.Module, strategy: str) -> None:
    """A part of the model that a strategy calls or changes by itself must hold its weights.

    Raises:
        UserError: they are generated for each call of the whole, by a hypernetwork.
    """
    if next(module.parameters(), None) is None:
        raise UserError(
            f"{strategy} works on the network's own weights, and a strategy beside it generates them instead; leave "
            "one of the two out"
        )


class Teacher:
    """The model as it was when `take` was called last; empty before. Predicts in evaluation mode, without gradient."""

    def __init__(self) -> None:
        self.vectors: Vectors = {}

    def __bool__(self) -> bool:
        return bool(self.vectors)

    def take(self, state: TrainState) -> None:
        buffers = {name: buffer.detach().clone() for name, buffer in state.model.named_buffers()}
        self.vectors = snapshot(state) | buffers

    def __call__(self, state: TrainState, rows: Batch) -> Output:
        with torch.no_grad(), evaluation_mode(state.model):
            return state.forward(rows, lambda batch: functional_call(state.model, self.vectors, (batch,)))

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.vectors)

    def state_dict(self) -> Vectors:
        return self.vectors

    def load_state_dict(self, vectors: dict[str, Any]) -> None:
        self.vectors = copied(vectors)


def in_float(tensor: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
