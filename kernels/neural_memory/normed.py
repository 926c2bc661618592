"""The slope of the squared error behind a LayerNorm, as in TTT, in few passes: it is taken once a chunk, in a row.

With y the normalised product x and r one over its deviation, the error of the answer k + gamma y + bias times gamma and
the step is e = scale y - shift, linear in y, and the slope is r P e, where P e = e - mean(e) - y mean(e y).

Legend: H heads, c tokens, V value width; leading sizes as they come.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves autograd.Function.apply without types

from typing import Any

import torch
from torch import Tensor

from kernels.neural_memory.model import NORM_EPS, through_norm


def targets(k: Tensor, v: Tensor, step: Tensor, norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """scale and shift [..., H, c, V] of all chunks at once."""
    gamma, bias = (p[:, None] for p in norm)
    weight = step * gamma
    return weight * gamma, (v - k - bias) * weight


def slope(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """d loss / d x times the step."""
    found: Tensor = _Slope.apply(x, scale, shift)
    return found


def _plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return through_norm(x, scale * torch.nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS) - shift)


def _back(delta: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """r P delta."""
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        delta, x, x.shape[-1:], mean, r, None, None, [True, False, False]
    )[0]
    return found


class _Slope(torch.autograd.Function):
    """By torch's own passes, whose derivatives lack some of their terms: the first are by hand, higher ones plain.

    P is symmetric. For a cotangent u that of e is n = r P u; that of y is s = scale n - r (u mean(e y) + e mean(u y));
    and of x it is r P s, less r y mean(u slope) for the r in front.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
        e = torch.addcmul(shift, scale, y, value=-1).neg_()
        found = _back(e, x, mean, r)
        ctx.save_for_backward(x, scale, shift, y, mean, r, e, found)
        return found

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, y, mean, r, e, found = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = [z if z.requires_grad else z.detach().requires_grad_() for z in (x, scale, shift)]
            return torch.autograd.grad(_plain(*given), given, u, create_graph=True)
        n = _back(u, x, mean, r)
        s = u * (e * y).mean(-1, keepdim=True)
        s.addcmul_(e, (u * y).mean(-1, keepdim=True)).mul_(-r).addcmul_(scale, n)
        dx = _back(s, x, mean, r).addcmul_(y, (u * found).mean(-1, keepdim=True).mul_(r), value=-1)
        return dx, n * y, -n
