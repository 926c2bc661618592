"""Hold a linear layer on the side of its inputs, where it costs a few products with the batch and not with the weights.

    P = I - U diag(s) U^T
    of gradients:  dL/dW = delta^T (P x)                        W moves as P lets it, and answers as it is
    of answers:    W_held x = W (P x) + (W_start U) diag(s) (U^T x),    W_held = W_start + (W - W_start) P

The first is enough where a step is a sum of gradients, as with SGD and momentum (orthogonal traces, as in HLOP): two
products with the batch. Momentum's quotient in Adam, weight decay and penalties on the weights move W along U as well;
then the layer answers as if every change had been projected: six products. `fold` writes into W what it answers with.

Shape legend: B rows of a batch, D inputs of a unit, O units, R directions held. A bias is the weight of an input of 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies._layer_inputs import input_rows
from strategies._subspace import InputSubspace

ROUNDING = 1e-4
"""Relative change of a response that rounding may explain."""


class HeldInputs:
    """A linear layer that is held, from `attach` to `detach`.

    Args:
        response: (O, R) what the layer said to the directions held when they were taken.
        by_gradients: hold it by its gradients; else by its answers.

    Attributes:
        seen: the last inputs that were trained on, as rows (B, D) with the input of the bias, and their part outside
            the directions held; None where the layer is held by its answers.
    """

    def __init__(self, layer: nn.Linear, subspace: InputSubspace, response: Tensor, by_gradients: bool) -> None:
        self.layer, self.weight, self.subspace, self.response = layer, layer.weight, subspace, response
        self.by_gradients = by_gradients
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None
        vars(layer)["forward"] = self._answer if by_gradients else self._answer_held

    def hold_answers(self) -> None:
        """Its gradients are not enough: from now on hold what it answers."""
        self.by_gradients, self.seen = False, None
        vars(self.layer)["forward"] = self._answer_held

    def detach(self) -> None:
        vars(self.layer).pop("forward", None)
        self.seen = None

    def fold(self) -> bool:
        """Write the weights that the layer answers with into it.

        Returns:
            whether anything but projected gradients has moved it along the directions held.
        """
        now = self.subspace.response(self.layer)
        moved = (now - self.response).abs().max() > ROUNDING * self.response.abs().max()
        self.response = self.subspace.hold(self.layer, self.response, now)
        return bool(moved)

    def rows_of(self, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows and their part outside, as `seen`, if these inputs are the ones."""
        if self.seen is None or self.seen[0].data_ptr() != inputs.data_ptr() or self.seen[0].shape != inputs.shape:
            return None
        return self.seen[1:]

    # by gradients

    def _answer(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        # with other weights in its place, those of a teacher, it is not this layer
        if layer.weight is not self.weight or not torch.is_grad_enabled():
            return F.linear(inputs, layer.weight, layer.bias)
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            rows_BD = input_rows(layer, inputs)
            part_BR = (rows_BD @ self.subspace.basis).mul_(self.subspace.strength)
            outside_BD = torch.addmm(rows_BD, part_BR, self.subspace.basis.T, alpha=-1)
        self.seen = (inputs.detach(), rows_BD, outside_BD)
        inputs = _as_computed(inputs)
        width = inputs.shape[-1]
        traces = outside_BD[:, :width].view(inputs.shape).to(inputs.dtype)
        if layer.bias is None:
            return _linear_with_traces(inputs, layer.weight, traces)
        # the constant input has its part outside too
        answer = _linear_with_traces(inputs, layer.weight, traces, layer.bias.detach())
        return _BiasWithTraces.apply(answer, layer.bias, outside_BD[:, width])

    # by answers

    def _answer_held(self, inputs: Tensor) -> Tensor:
        layer, basis = self.layer, self.subspace.basis
        if layer.weight is not self.weight:
            return F.linear(inputs, layer.weight, layer.bias)
        inputs = _as_computed(inputs)
        basis_DR = (basis if layer.bias is None else basis[:-1]).to(inputs)
        part = inputs @ basis_DR if layer.bias is None else inputs @ basis_DR + basis[-1].to(inputs)
        part = part * self.subspace.strength.to(inputs)
        # the weights learn from what they read, as everywhere: what they learn is projected once, when it is folded
        answer = _linear_with_traces(inputs - part @ basis_DR.T, layer.weight, inputs) + part @ self.response.T.to(part)
        if layer.bias is None:
            return answer
        # the constant input is projected too
        inside = (part @ basis[-1].to(part)).unsqueeze(-1)
        return answer + (layer.bias - inside * layer.bias.detach()).to(answer.dtype)


def adds_gradients(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps are sums of gradients, so that projecting these projects the steps."""
    return type(optimizer) is torch.optim.SGD and not any(group["weight_decay"] for group in optimizer.param_groups)


@torch.no_grad()
def project_momentum(optimizer: Optimizer, layer: nn.Module, subspace: InputSubspace) -> None:
    """What momentum carries over from before the directions were held must not move the weights along them."""
    if type(layer) is not nn.Linear or not adds_gradients(optimizer) or not subspace.is_exact:
        return
    buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in (layer.weight, layer.bias)]
    if buffers[0] is None:
        return
    whole = buffers[0] if buffers[1] is None else torch.cat([buffers[0], buffers[1][:, None]], dim=1)
    kept = subspace.project(whole)
    buffers[0].copy_(kept[:, : buffers[0].shape[1]])
    if buffers[1] is not None:
        buffers[1].copy_(kept[:, -1])


def _as_computed(inputs: Tensor) -> Tensor:
    """In the precision of the run, one row after the other: of others a linear layer keeps a copy, not the inputs."""
    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    return inputs.contiguous()


class _BiasWithTraces(torch.autograd.Function):
    """A bias that the answer holds already, and that learns from other inputs (B,) than the constant 1."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, bias: Tensor, traces_B: Tensor) -> Tensor:
        ctx.save_for_backward(traces_B)
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (traces_B,) = ctx.saved_tensors
        return gradient, traces_B @ gradient.flatten(0, -2).to(traces_B.dtype), None


def _linear_with_traces(inputs: Tensor, weight: Tensor, traces: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose weights learn from other inputs than it answers.

    What autograd keeps of the inputs is exchanged, so that the gradient is torch's own, which is not copied again.
    """

    def exchanged(kept: Tensor) -> Tensor:
        is_inputs = kept.data_ptr() == inputs.data_ptr() and kept.numel() == inputs.numel()
        return traces.view(kept.shape) if is_inputs else kept

    with torch.autograd.graph.saved_tensors_hooks(exchanged, lambda kept: kept):
        return F.linear(inputs, weight, bias)
