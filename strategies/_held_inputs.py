"""Hold a linear layer on the side of its inputs, where it costs a few products with the batch and not with the weights.

    W_held = W_start + (W - W_start) P,   P = I - U diag(s) U^T
    W_held x = W (P x) + (W_start U) diag(s) (U^T x)

Whatever moves W, the layer answers as if every change had been projected: gradient, momentum, weight decay and Adam's
division alike. Its gradient is taken with the projected inputs, as with the orthogonal traces of HLOP. `fold` writes
W_held into the weights, which changes no answer.

Shape legend: B rows of a batch, D inputs of a unit, O units, R directions held. A bias is the weight of an input of 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from strategies._subspace import InputSubspace


class HeldInputs:
    """Two hooks around a linear layer, from `attach` to `detach`.

    Args:
        response: (O, R) what the layer said to the directions held when they were taken.
    """

    def __init__(self, layer: nn.Linear, subspace: InputSubspace, response: Tensor) -> None:
        self.layer, self.subspace, self.response = layer, subspace, response
        self._parts: list[Tensor] = []
        self._handles = [layer.register_forward_pre_hook(self._enter), layer.register_forward_hook(self._leave)]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def fold(self) -> Tensor:
        """Write the weights that the layer answers with into it; returns its response."""
        self.response = self.subspace.hold(self.layer, self.response)
        return self.response

    def _enter(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # with other weights in its place, those of a teacher, it is not this layer
        if layer.weight is not self.layer.weight:
            return None
        basis, inputs = self.subspace.basis, args[0]
        part = inputs @ (basis if layer.bias is None else basis[:-1]).to(inputs)
        if layer.bias is not None:
            part = part + basis[-1].to(inputs)
        part = part * self.subspace.strength.to(inputs)
        self._parts.append(part)
        return (inputs - part @ (basis if layer.bias is None else basis[:-1]).T.to(part), *args[1:])

    def _leave(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if layer.weight is not self.layer.weight:
            return None
        part = self._parts.pop()
        held = part @ self.response.T.to(part)
        if layer.bias is not None:
            # the constant input is projected too
            held = held - (part @ self.subspace.basis[-1].to(part)).unsqueeze(-1) * layer.bias.to(part)
        return output + held.to(output.dtype)
