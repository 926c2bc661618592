"""Read what a module inside a model computes, while a step lasts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl.core import UserError


class Tap:
    """The output of a module in the latest forward pass that takes gradients; of a tuple its first tensor.

    Args:
        path: of the module in the model, such as "blocks.1".

    Attributes:
        hears_all: listen to passes without gradients too, such as those of a teacher.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.value: Tensor | None = None
        self.hears_all = False
        self._handle: RemovableHandle | None = None

    def check(self, model: nn.Module, name: str) -> None:
        """Whether the model has the module.

        Args:
            name: the argument as a user writes it.

        Raises:
            UserError: it does not.
        """
        paths = [path for path, _ in model.named_modules() if path]
        if self.path not in paths:
            some = ", ".join(path for path in paths if path.count(".") <= self.path.count("."))
            raise UserError(f"{name} is {self.path!r}, no module of {type(model).__name__}; it has {some[:400]}")

    def open(self, model: nn.Module) -> None:
        """Listen from now on; again changes nothing."""
        if self._handle is None:
            self._handle = model.get_submodule(self.path).register_forward_hook(self._note)

    def close(self) -> None:
        """Leave no hook and no tensor behind."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self.value = None
        self.hears_all = False

    def _note(self, module: nn.Module, given: Any, output: Any) -> None:
        if self.hears_all or torch.is_grad_enabled():
            self.value = output if isinstance(output, Tensor) else output[0]
