"""Spiking network: leaky integrate-and-fire layers, read out by their firing rates.

    I[t] = W s_in[t] + b,   u[t] = decay (u[t-1] - threshold s[t-1]) + I[t],   s[t] = 1 where u[t] >= threshold
    rate = mean over t of s[t] of the last layer;  logits = head(rate)

The derivative of a spike is replaced by that of a sigmoid of slope `slope`. Two rules train the weights:

    bptt:  gradients flow back through the membrane from step to step
    ottt:  they do not; synapses remember instead, a[t] = decay a[t-1] + s_in[t], and dL/dW = sum_t delta[t] a[t]

Source: Neftci, Mostafa & Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", 2019 (bptt); Xiao et al.,
"Online Training Through Time for Spiking Neural Networks", NeurIPS 2022 (ottt). Sizes as in pkuxmq/HLOP-SNN
modules/neuron_ottt.py: decay 1/2, threshold 1, 6 steps, slope 4.
Differences: images are a constant current into the first layer (direct coding). The loss is taken once, on the mean
rate, where online training takes one in each step; so the graph of all steps is kept, and the memory that online
training saves is not saved here. No normalisation; weights are drawn by He's uniform rule, so that deep layers fire.

Shape legend: B rows of a batch, T time steps, D inputs of a layer, F units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import Backbone, Stage, require_width
from cl.core import StreamInfo, UserError

RULES = ("bptt", "ottt")


class Snn(Backbone):
    """Flatten, then `hidden` layers of spiking units, then the head on their firing rates.

    Args:
        hidden: widths of the spiking layers; at least one.
        num_steps: time steps of a row.
        decay: of the membrane from step to step, in [0, 1).
        threshold: at which a unit fires, and what its membrane then loses.
        slope: of the sigmoid whose derivative stands for that of a spike.
        rule: "bptt" or "ottt".
        bias: False leaves out every bias, the head's too.

    Raises:
        UserError: a value outside its range.

    Cost: of the layers of an MLP times num_steps, but for the first, whose input does not change.
    """

    def __init__(
        self,
        info: StreamInfo,
        hidden: Sequence[int] = (256, 256),
        num_steps: int = 6,
        decay: float = 0.5,
        threshold: float = 1.0,
        slope: float = 4.0,
        rule: str = "bptt",
        bias: bool = True,
    ) -> None:
        if not isinstance(hidden, Sequence) or isinstance(hidden, str) or not hidden:
            raise UserError(
                f"backbone.hidden is {hidden!r}; it must be a list of at least one width, such as [256,256]"
            )
        for width in hidden:
            require_width("hidden", width)
        require_width("num_steps", num_steps)
        if not 0 <= decay < 1:
            raise UserError(f"backbone.decay is {decay!r}; it must be at least 0 and below 1")
        for name, value in (("threshold", threshold), ("slope", slope)):
            if not value > 0:
                raise UserError(f"backbone.{name} is {value!r}; it must be above 0")
        if rule not in RULES:
            raise UserError(f"backbone.rule is {rule!r}; it must be one of {', '.join(RULES)}")
        super().__init__(info, hidden[-1])
        widths = [math.prod(info.input_shape), *hidden]
        self.layers = nn.ModuleList(
            SpikingLinear(width_in, width_out, num_steps, decay, is_online=rule == "ottt")
            for width_in, width_out in pairwise(widths)
        )
        if not bias:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.register_parameter("bias", None)
        self.fire = partial(integrate_and_fire, decay=decay, threshold=threshold, slope=slope, is_online=rule == "ottt")

    def stages(self) -> Sequence[Stage]:
        """Every spiking layer; what one hands on are its spikes (B, F, T), the last one its rates (B, F)."""
        last = len(self.layers) - 1
        return [
            Stage(partial(self._layer, layer, is_first=number == 0, is_last=number == last), (layer,))
            for number, layer in enumerate(self.layers)
        ]

    def _layer(self, layer: nn.Module, inputs: Tensor, is_first: bool, is_last: bool) -> Tensor:
        inputs_BTD = inputs.flatten(1).unsqueeze(1) if is_first else inputs.transpose(1, 2)
        spikes_BTF = self.fire(layer(inputs_BTD))
        return spikes_BTF.mean(1) if is_last else spikes_BTF.transpose(1, 2)


class SpikingLinear(nn.Linear):
    """Synapses: currents of the spikes of every step.

    Args:
        num_steps, decay: of the network.
        is_online: the gradient of the weights is taken by traces (ottt).
    """

    def __init__(self, width_in: int, width_out: int, num_steps: int, decay: float, is_online: bool) -> None:
        super().__init__(width_in, width_out)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)
        self.num_steps, self.decay, self.is_online = num_steps, decay, is_online

    def forward(self, spikes_BTD: Tensor) -> Tensor:
        """Currents (B, T, F); inputs of a single step are the same in all."""
        currents = super().forward(spikes_BTD)
        if self.is_online:
            memory_T1 = self._memory(spikes_BTD)[:, None]
            if spikes_BTD.shape[1] == 1:
                # what does not change is remembered in proportion to how often it was seen
                return _as(currents.expand(-1, self.num_steps, -1), currents * memory_T1)
            learnt = F.linear(traces(spikes_BTD, self.decay), self.weight)
            if self.bias is not None:
                learnt = learnt + memory_T1 * self.bias
            return _as(currents, F.linear(spikes_BTD, self.weight.detach()) + learnt)
        return currents.expand(-1, self.num_steps, -1)

    def presynaptic(self, spikes_BTD: Tensor) -> Tensor:
        """(B, T, D) what synapses remember at every step, as a weighted firing rate: what their weights learn from.

        Every spike is a combination of two of them, so weights that are held on them are held on spikes.
        """
        if spikes_BTD.shape[1] == 1:
            return spikes_BTD
        return traces(spikes_BTD, self.decay) / self._memory(spikes_BTD)[:, None]

    def _memory(self, like: Tensor) -> Tensor:
        """(T,) what a synapse remembers of a constant 1."""
        ones = torch.ones(1, self.num_steps, 1, dtype=like.dtype, device=like.device)
        return traces(ones, self.decay).flatten()


def traces(spikes_BTD: Tensor, decay: float) -> Tensor:
    """a[t] = decay a[t-1] + s[t].

    Example:
        >>> traces(torch.ones(1, 3, 1), 0.5).flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    found: list[Tensor] = []
    for spikes in spikes_BTD.detach().unbind(1):
        found.append(decay * found[-1] + spikes if found else spikes)
    return torch.stack(found, dim=1)


def integrate_and_fire(
    currents_BTF: Tensor, decay: float, threshold: float, slope: float, is_online: bool = False
) -> Tensor:
    """Spikes (B, T, F) of leaky membranes that start at rest.

    Example:
        >>> integrate_and_fire(torch.full((1, 4, 1), 0.6), 0.5, 1.0, 4.0).flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    membrane = torch.zeros_like(currents_BTF[:, 0])
    fired: list[Tensor] = []
    for current in currents_BTF.unbind(1):
        rest = membrane - threshold * fired[-1] if fired else membrane
        membrane = decay * (rest.detach() if is_online else rest) + current
        excess = membrane - threshold
        fired.append(_as((excess >= 0).to(excess.dtype), torch.sigmoid(slope * excess)))
    return torch.stack(fired, dim=1)


def _as(value: Tensor, gradient_of: Tensor) -> Tensor:
    """A value that is differentiated as if it were another one."""
    return value.detach() + (gradient_of - gradient_of.detach())
