"""What a neural memory is: layers of matrices, an activation between them, an inner loss, and the loss's slope.

Written by hand so that the gradient of the inner loss, an outer product per token and layer, is never formed.

Legend: S sequences, H heads, c tokens, K/V key/value width; layer l maps inputs_l [S, H, c, in] by W_l [S, H, in, out].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

ACTIVATIONS = ("gelu", "silu")
LOSSES = ("l2", "huber", "lp")
NORM_EPS = 1e-6


class Model(NamedTuple):
    """How a memory answers and is judged; `norm` (gamma, bias), each [H, V], makes it x + LayerNorm(f(x)) as in TTT."""

    activation: str
    loss: str
    threshold: float
    norm: tuple[Tensor, Tensor] | None


class Answer(NamedTuple):
    """Output of the memory and, per layer, its input and its product before the activation."""

    output: Tensor
    inputs: list[Tensor]
    products: list[Tensor]


def _activate(x: Tensor, kind: str) -> Tensor:
    return gelu(x) if kind == "gelu" else silu(x)


def _before_activation(delta: Tensor, x: Tensor, kind: str) -> Tensor:
    """delta times the derivative of the activation at x."""
    if kind == "gelu":
        # torch's own pass, which has derivatives of all orders; that of silu has none
        found: Tensor = torch.ops.aten.gelu_backward(delta, x)
        return found
    s = torch.sigmoid(x)
    return delta * (s * (1 + x * (1 - s)))


def answer(x: Tensor, layers: int, product: Callable[[int, Tensor], Tensor], model: Model) -> Answer:
    """Run x through the layers; `product(l, inputs)` multiplies with layer l, whatever form its matrix has."""
    found = before_norm(x, layers, product, model)
    if model.norm is None:
        return found
    gamma, bias = (p[:, None] for p in model.norm)
    normed = layer_norm(found.output, found.output.shape[-1:], eps=NORM_EPS)
    return found._replace(output=torch.addcmul(x + bias, normed, gamma))


def before_norm(x: Tensor, layers: int, product: Callable[[int, Tensor], Tensor], model: Model) -> Answer:
    """`answer` but for the norm and what comes behind it: the output is the last product."""
    inputs, products, h = [], [], x
    for layer in range(layers):
        inputs.append(h)
        products.append(product(layer, h))
        h = products[-1] if layer == layers - 1 else _activate(products[-1], model.activation)
    return Answer(h, inputs, products)


def through_norm(x: Tensor, delta: Tensor) -> Tensor:
    """The gradient delta by LayerNorm (without its parameters) of x, taken to x."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    y = centred * inverse
    return (delta - delta.mean(-1, keepdim=True) - y * (delta * y).mean(-1, keepdim=True)) * inverse


def _loss_slope(error: Tensor, model: Model) -> Tensor:
    """d loss / d output: l2 is |e|^2 / 2, huber is linear beyond the threshold, lp is sum |e|^p / p, p = threshold."""
    if model.loss == "l2":
        return error
    if model.loss == "huber":
        return error.clamp(-model.threshold, model.threshold)
    # where there is no error, a power below 1 has no slope that could be differentiated
    return error.sign() * error.abs().masked_fill(error == 0, 1).pow(model.threshold - 1)


def slopes(
    found: Answer, target: Tensor, weights: Sequence[Tensor], model: Model, step: Tensor | None = None
) -> list[Tensor]:
    """d loss / d products of every layer, times `step`: that of W_l is the outer product of inputs_l and this."""
    delta = _loss_slope(found.output - target, model)
    if step is not None:
        delta = delta * step
    if model.norm is not None:
        delta = through_norm(found.products[-1], delta * model.norm[0][:, None])
    return to_all_layers(delta, found.products, weights, model)


def to_all_layers(delta: Tensor, products: Sequence[Tensor], weights: Sequence[Tensor], model: Model) -> list[Tensor]:
    """From the slope of the last product those of all."""
    deltas = [delta]
    for layer in range(len(weights) - 1, 0, -1):
        delta = _before_activation(delta @ weights[layer].mT, products[layer - 1], model.activation)
        deltas.insert(0, delta)
    return deltas
