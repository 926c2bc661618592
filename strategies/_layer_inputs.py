"""What the layers of a network read: which layers can be looked into, and rows of their inputs, caught as they run.

Shape legend: B rows of a batch, N rows of a layer's inputs, O units, D inputs of a unit. Where a layer has a bias, its
inputs have a last column of ones, so that the bias is one more weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones import Backbone, MultiHead
from cl.core import Batch, UserError
from strategies._modules import owners

Layers = dict[str, Any]
"""Linear and convolutional layers by name; their `weight` and `bias` are what is protected."""

SUPPORTED = "Linear, Conv1d and Conv2d without groups, and the layers of backbone snn"


def find_layers(model: nn.Module, strategy: str, others: str | None = None) -> Layers:
    """The layers of a model whose inputs can be read, the head last.

    Heads of single tasks are left out: no other task trains them.

    Args:
        others: what becomes of any other trained layer: "refuse" raises and names the ways out, None raises and knows
            of none.

    Raises:
        UserError: names the layer and the supported types.

    Example:
        >>> from cl.backbones.mlp import Mlp
        >>> from cl.core import Setting, StreamInfo
        >>> info = StreamInfo("rows", Setting.CLASS_INCREMENTAL, (4,), num_outputs=2, num_experiences=1)
        >>> list(find_layers(Mlp(info, [8, 8]), "gpm"))
        ['body.1', 'body.3', 'head']
    """
    found: Layers = {}
    # a backbone makes its head before the layers under it
    heads = {id(m) for each in model.modules() if isinstance(each, Backbone) for m in each.head.modules()}
    of_one_task = {id(m) for head in model.modules() if isinstance(head, MultiHead) for m in head.modules()}
    for name, module in sorted(owners(model).items(), key=lambda item: id(item[1]) in heads):
        if id(module) in of_one_task:
            continue
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1):
            found[name] = module
        elif others in ("refuse", None):
            ways_out = f"; {strategy}.others=freeze holds all others after the first experience, train lets them go"
            raise UserError(
                f"{strategy} cannot work on the layer {name or '(the model itself)'} ({type(module).__name__}) of "
                f"{type(model).__name__}; it works on {SUPPORTED}" + ways_out * (others == "refuse")
            )
    if not found:
        raise UserError(f"{strategy} finds no layer to work on in {type(model).__name__}; it works on {SUPPORTED}")
    return found


def input_rows(layer: Any, inputs: Tensor) -> Tensor:
    """Inputs of a layer as rows (N, D) that its weights (O, D) are multiplied with.

    Example:
        >>> input_rows(nn.Conv2d(3, 5, 2), torch.zeros(4, 3, 6, 6)).shape
        torch.Size([100, 13])
    """
    if hasattr(layer, "presynaptic"):  # of a spiking layer: what its synapses remember at every step
        rows = layer.presynaptic(inputs)
    elif isinstance(layer, nn.Linear):
        rows = inputs
    else:
        rows = _patches(layer, inputs)
    rows_ND = rows.reshape(-1, rows.shape[-1]).to(layer.weight.dtype)
    return rows_ND if layer.bias is None else torch.cat([rows_ND, rows_ND.new_ones(len(rows_ND), 1)], dim=1)


def _patches(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """(B, L, D) what each place of a convolution's output is made of."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs.float(), layer._reversed_padding_repeated_twice, mode=mode).to(inputs.dtype)
    kernel, dilation, stride = (tuple(each) for each in (layer.kernel_size, layer.dilation, layer.stride))
    if isinstance(layer, nn.Conv1d):
        padded, kernel, dilation, stride = padded.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(padded, kernel, dilation, stride=stride).transpose(1, 2)


class Listener:
    """Catches what layers read, pass by pass, from `attach` to `detach`; changes nothing.

    Attributes:
        passes: what the model was called with, and the inputs of its layers in that call, since `clear`.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[Batch, dict[str, list[Tensor]]]] = []
        self._trained: list[tuple[Batch, dict[str, list[Tensor]]]] = []
        self._handles: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self._handles)

    def attach(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._handles = [model.register_forward_pre_hook(self._enter)]
        for name, layer in layers.items():
            # before anybody changes the inputs
            self._handles.append(layer.register_forward_pre_hook(partial(self._note, name), prepend=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        self.passes, self._trained = [], []

    def of(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Inputs in the last pass of a batch; of the last one of its size where the batch itself was not seen.

        Passes without gradients, such as those of a teacher, are none that is trained on.
        """
        same = [inputs for rows, inputs in self._trained if rows is batch]
        alike = [inputs for rows, inputs in self._trained if len(rows) == len(batch)]
        return (same or alike or [{}])[-1]

    def _enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.passes.append((args[0], {}))
        if torch.is_grad_enabled():
            self._trained.append(self.passes[-1])

    def _note(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.passes and not torch.is_inference_mode_enabled():
            self.passes[-1][1].setdefault(name, []).append(args[0].detach())


@contextmanager
def listening(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Listener]:
    """A listener for the passes inside."""
    listener = Listener()
    listener.attach(model, layers)
    try:
        yield listener
    finally:
        listener.detach()


def require_inputs(layers: Layers, seen: Collection[str], strategy: str) -> None:
    """Every layer that is being trained must have been called, or what it reads is not known.

    Raises:
        UserError: names the layer.
    """
    for name, layer in layers.items():
        if name not in seen and layer.weight.grad is not None:
            raise UserError(
                f"{strategy} cannot see what the layer {name} ({type(layer).__name__}) reads: its weights are used "
                f"without calling it; it works on {SUPPORTED} that are called"
            )
