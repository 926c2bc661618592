"""What a layer does between its products, in one pass over memory where torch makes up to fifteen.

On a CPU norms, gates and short convolutions cost what they read and write. Where numba is installed, float32 tensors of
some size go through compiled loops, forward and backward; everything else goes through torch, which is the definition.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from kernels.common.dispatch import HAS_NUMBA

# numbers from which milliseconds are saved, against the second that compiling takes once on a machine
WORTH = 2**16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean of x^2 + eps), over the last axis of x (..., D), weight (D).

    Example:
        >>> rms_norm(torch.tensor([3.0, -3.0]), torch.tensor([1.0, 2.0]), 0.0).tolist()
        [1.0, -2.0]
    """
    return _run("normed", _rms_norm, x, weight, 1 / x.shape[-1], eps)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps), over the last axis, in float32 inside.

    Example:
        >>> unit(torch.tensor([3.0, 0.0]), 7.0).tolist()
        [0.75, 0.0]
    """
    return _run("normed", _unit, x, None, 1.0, eps)


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, of one shape.

    Example:
        >>> gated(torch.tensor([0.0, 50.0]), torch.tensor([3.0, 2.0])).tolist()
        [0.0, 100.0]
    """
    return _run("gated", _gated, gate, x)


def convolved(x: Tensor, tail: Tensor, weight: Tensor, reset: Tensor | None, plain: Callable[..., Tensor]) -> Tensor:
    """y_t = silu(sum_j w_j * x_{t-j}) over the last J tokens of the document, each channel by itself.

    Args:
        x: (B, T, C). tail: (B, J - 1, C) tokens before them. weight: (C, J), the last tap of the token itself.
        reset: (B, T) True where a document starts, or None.
        plain: the same in torch.
    """
    return _run("convolved", plain, x, tail, weight, reset)


def running_sum(x: Tensor, starts: Tensor | None = None, period: float = 0.0) -> Tensor:
    """y_t = sum of x_s over s <= t, along the second axis of x (B, T, ...); in float64 inside, in the dtype of x.

    Args:
        starts: (B, T) True where the sum begins anew, or None.
        period: of an angle: whole turns are left out before digits are; 0 for none.

    Example:
        >>> running_sum(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]])).tolist()
        [[1.0, 3.0, 3.0]]
    """
    return _run("running_sum", _running_sum, x, starts, period)


def turned(x: Tensor, angle: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[x cos(angle), x sin(angle)] (..., 2 D) of x (..., D).

    Args:
        cos, sin: of the angle, computed once for several x; gradients flow to `angle`.
    """
    return _run("turned", _turned, x, angle, cos.detach(), sin.detach())


def _rms_norm(x: Tensor, weight: Tensor, _: float, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _unit(x: Tensor, _: None, share: float, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    return (wide * torch.rsqrt(share * wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _gated(gate: Tensor, x: Tensor) -> Tensor:
    return F.silu(gate) * x


def _running_sum(x: Tensor, starts: Tensor | None, period: float) -> Tensor:
    total = x.double().cumsum(1)
    if starts is not None:
        begun = torch.where(starts, torch.arange(x.shape[1], device=x.device), 0).cummax(1).values
        begun = begun.view(*begun.shape, *[1] * (x.dim() - 2)).expand(x.shape)
        total = total - (total - x).gather(1, begun)
    return (total.remainder(period) if period else total).to(x.dtype)


def _turned(x: Tensor, angle: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return torch.cat((x * angle.cos(), x * angle.sin()), -1).to(x.dtype)


def _run(name: str, plain: Callable[..., Tensor], *given: Any) -> Tensor:
    tensors = [each for each in given if isinstance(each, Tensor)]
    if torch.compiler.is_compiling() or tensors[0].numel() < WORTH or _obstacle(tensors):
        return plain(*given)
    y: Tensor = _OnePass.apply(name, plain, *given)
    return y


def _obstacle(tensors: list[Tensor]) -> bool:
    """Whether torch wants to see its own operations, the caller asked for no loops, or there are none for this."""
    return (
        not HAS_NUMBA
        or os.environ.get("KERNELS_BACKEND", "auto") not in ("auto", "numba")
        or getattr(forward_ad, "_current_level", -1) >= 0
        or not all(map(_is_array, tensors))
    )


def _is_array(x: Tensor) -> bool:
    """Whether the loops read it: numbers in memory, float32, or the flags of resets."""
    is_own = type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return is_own and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bool)


class _OnePass(torch.autograd.Function):
    """The compiled loops of one name; gradients of gradients, and many at once, are those of `plain`."""

    @staticmethod
    def forward(ctx: Any, name: str, plain: Callable[..., Tensor], *given: Any) -> Tensor:
        from kernels.common import numba_fused

        ctx.name, ctx.plain = name, plain
        ctx.options = [None if isinstance(each, Tensor) else each for each in given]
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in given))
        y: Tensor = getattr(numba_fused, name)(*given)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        from kernels.common import numba_fused

        kept = zip(ctx.saved_tensors, ctx.options, strict=True)
        given = [option if tensor is None else tensor for tensor, option in kept]
        is_differentiated = torch.is_grad_enabled()
        if not is_differentiated and _is_array(dy):
            return None, None, *getattr(numba_fused, f"{ctx.name}_backward")(dy, *given)
        asked = [n for n, each in enumerate(given) if isinstance(each, Tensor) and each.requires_grad]
        with torch.enable_grad():
            y = ctx.plain(*given)
        found = torch.autograd.grad(y, [given[n] for n in asked], dy, create_graph=is_differentiated)
        by_place = dict(zip(asked, found, strict=True))
        return None, None, *(by_place.get(n) for n in range(len(given)))
