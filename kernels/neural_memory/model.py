"""What a neural memory is: layers of matrices, an activation between them, an inner loss, and the loss's slope.

Written by hand so that the gradient of the inner loss, an outer product per token and layer, is never formed.

Legend: S sequences, H heads, c tokens, K/V key/value width; layer l maps inputs_l [S, H, c, in] by W_l [S, H, in, out].
"""

import math
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


def _slope(x: Tensor, kind: str) -> Tensor:
    """Derivative of the activation."""
    if kind == "gelu":
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        below: Tensor = torch.special.ndtr(x)
        return below + x * density
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def answer(x: Tensor, layers: int, product: Callable[[int, Tensor], Tensor], model: Model) -> Answer:
    """Run x through the layers; `product(l, inputs)` multiplies with layer l, whatever form its matrix has."""
    inputs, products, h = [], [], x
    for layer in range(layers):
        inputs.append(h)
        products.append(product(layer, h))
        h = products[-1] if layer == layers - 1 else _activate(products[-1], model.activation)
    if model.norm is not None:
        gamma, bias = (p[:, None] for p in model.norm)
        h = torch.addcmul(x + bias, layer_norm(h, h.shape[-1:], eps=NORM_EPS), gamma)
    return Answer(h, inputs, products)


def _normalised(y: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without its parameters, and one over the standard deviation."""
    centred = y - y.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return centred * inverse, inverse


def _loss_slope(error: Tensor, model: Model) -> Tensor:
    """d loss / d output: l2 is |e|^2 / 2, huber is linear beyond the threshold, lp is sum |e|^p / p, p = threshold."""
    if model.loss == "l2":
        return error
    if model.loss == "huber":
        return error.clamp(-model.threshold, model.threshold)
    return error.sign() * error.abs().pow(model.threshold - 1)


def slopes(
    found: Answer, target: Tensor, weights: Sequence[Tensor], model: Model, step: Tensor | None = None
) -> list[Tensor]:
    """d loss / d products of every layer, times `step`: that of W_l is the outer product of inputs_l and this."""
    delta = _loss_slope(found.output - target, model)
    if step is not None:
        delta = delta * step
    if model.norm is not None:
        y, inverse = _normalised(found.products[-1])
        inner = delta * model.norm[0][:, None]
        delta = (inner - inner.mean(-1, keepdim=True) - y * (inner * y).mean(-1, keepdim=True)) * inverse
    deltas = [delta]
    for layer in range(len(weights) - 1, 0, -1):
        delta = (delta @ weights[layer].mT) * _slope(found.products[layer - 1], model.activation)
        deltas.insert(0, delta)
    return deltas
