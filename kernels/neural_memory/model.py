"""What a neural memory is: layers of matrices, an activation between them, an inner loss, and the loss's slope.

Written by hand so that the gradient of the inner loss, an outer product per token and layer, is never formed.

Legend: S sequences, H heads, c tokens, K/V key/value width; layer l maps inputs_l [S, H, c, in] by W_l [S, H, in, out].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# mypy: disable-error-code="no-untyped-call"
# torch leaves autograd.Function.apply without types

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
    inputs, products, h = [], [], x
    for layer in range(layers):
        inputs.append(h)
        products.append(product(layer, h))
        h = products[-1] if layer == layers - 1 else _activate(products[-1], model.activation)
    if model.norm is not None:
        gamma, bias = (p[:, None] for p in model.norm)
        h = torch.addcmul(x + bias, layer_norm(h, h.shape[-1:], eps=NORM_EPS), gamma)
    return Answer(h, inputs, products)


def _before_norm_plain(y: Tensor, delta: Tensor) -> Tensor:
    """delta through LayerNorm without its parameters, to its input y."""
    centred = y - y.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    y = centred * inverse
    return (delta - delta.mean(-1, keepdim=True) - y * (delta * y).mean(-1, keepdim=True)) * inverse


class _BeforeNorm(torch.autograd.Function):
    """The same in torch's own passes, whose second derivatives torch has wrong: the first are by hand, the others plain.

    With P the symmetric map delta - mean(delta) - y mean(delta y) of the normalised y and r = 1 / deviation it is r P,
    and for a cotangent u the gradients are r P u and r P s - r y mean(u r P delta), s = -r (u mean(delta y) + delta
    mean(u y)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
        found = _through(delta, x, mean, inverse)
        ctx.save_for_backward(x, delta, y, mean, inverse, found)
        return found

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        x, delta, y, mean, inverse, found = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = [z if z.requires_grad else z.detach().requires_grad_() for z in (x, delta)]
            dx, ddelta = torch.autograd.grad(_before_norm_plain(*given), given, u, create_graph=True)
            return dx, ddelta
        s = u * (delta * y).mean(-1, keepdim=True)
        s.addcmul_(delta, (u * y).mean(-1, keepdim=True)).mul_(-inverse)
        dx = _through(s, x, mean, inverse)
        return dx.addcmul_(y, (u * found).mean(-1, keepdim=True).mul_(-inverse)), _through(u, x, mean, inverse)


def _through(delta: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    backward = torch.ops.aten.native_layer_norm_backward
    found: Tensor = backward(delta, x, x.shape[-1:], mean, inverse, None, None, [True, False, False])[0]
    return found


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
        delta = _BeforeNorm.apply(found.products[-1], delta * model.norm[0][:, None])
    deltas = [delta]
    for layer in range(len(weights) - 1, 0, -1):
        delta = _before_activation(delta @ weights[layer].mT, found.products[layer - 1], model.activation)
        deltas.insert(0, delta)
    return deltas
