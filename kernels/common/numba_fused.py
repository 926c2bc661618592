"""`kernels.common.fused` for float32 tensors: each function and its gradient, of the arguments that are given there.

What the loops read and write, as arrays; weights' gradients are summed over lanes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.common import numba_fused_loops as loops
from kernels.common.numba import array, spread
from kernels.common.numba_fused_loops import BLOCK

# multiplications a number, about: what decides on threads
WORK = 4


def normed(x: Tensor, weight: Tensor | None, share: float, eps: float) -> Tensor:
    """x / sqrt(share * |x|^2 + eps), times the weight."""
    y = x.new_empty(x.shape)
    _run(loops.normed, x, _flat(x), _weight(weight, x), np.float32(share), np.float32(eps), _flat(y))
    return y


def normed_backward(dy: Tensor, x: Tensor, weight: Tensor | None, share: float, eps: float) -> tuple[Any, ...]:
    """Gradients of `normed`."""
    dx, rows = x.new_empty(x.shape), _flat(x)
    dweight = x.new_zeros(-(-len(rows) // BLOCK), x.shape[-1])
    given = _flat(dy), rows, _weight(weight, x), np.float32(share), np.float32(eps)
    _run(loops.normed_backward, x, *given, _flat(dx), dweight.numpy())
    return dx, None if weight is None else dweight.sum(0), None, None


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x."""
    y = x.new_empty(x.shape)
    _run(loops.gated, x, *(_flat(each) for each in (gate, x, y)))
    return y


def gated_backward(dy: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated`."""
    dgate, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    _run(loops.gated_backward, x, *(_flat(each) for each in (dy, gate, x, dgate, dx)))
    return dgate, dx


def convolved(x: Tensor, tail: Tensor, weight: Tensor, reset: Tensor | None) -> Tensor:
    """silu of a short convolution over the tokens that each token sees."""
    y = x.new_empty(x.shape)
    _spread(loops.convolved, x, *_tokens(x, tail, weight, reset), y.numpy())
    return y


def convolved_backward(
    dy: Tensor, x: Tensor, tail: Tensor, weight: Tensor, reset: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of `convolved`."""
    dx, dtail = x.new_empty(x.shape), x.new_zeros(tail.shape)
    dweight = x.new_zeros(len(x) * -(-x.shape[1] // BLOCK), *weight.shape[::-1])
    given = array(dy), *_tokens(x, tail, weight, reset)
    # more taps than a lane has tokens: several lanes would write to the tail
    is_alone = tail.shape[1] > BLOCK
    _spread(loops.convolved_backward, x, *given, dx.numpy(), dtail.numpy(), dweight.numpy(), is_alone=is_alone)
    return dx, dtail, dweight.sum(0).T, None


def running_sum(x: Tensor, starts: Tensor | None, period: float) -> Tensor:
    """Sums so far, less whole periods."""
    y = x.new_empty(x.shape)
    spread(loops.running_sum, len(x), WORK * x.numel(), _columns(x), _starts(x, starts), period, _columns(y))
    return y


def running_sum_backward(dy: Tensor, x: Tensor, starts: Tensor | None, _: float) -> tuple[Tensor | None, ...]:
    """Gradients of `running_sum`: sums of what comes after."""
    dx = x.new_empty(x.shape)
    spread(loops.running_sum_backward, len(x), WORK * x.numel(), _columns(dy), _starts(x, starts), _columns(dx))
    return dx, None, None


def turned(x: Tensor, _: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[x cos, x sin]."""
    y = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    _run(loops.turned, x, *(_flat(each) for each in (x, cos, sin, y)))
    return y


def turned_backward(dy: Tensor, x: Tensor, _: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `turned`, those of the angle among them."""
    dx, dangle = x.new_empty(x.shape), x.new_empty(x.shape)
    _run(loops.turned_backward, x, *(_flat(a) for a in (dy, x, cos, sin, dx, dangle)))
    return dx, dangle, None, None


def _columns(x: Tensor) -> np.ndarray:
    return array(x).reshape(*x.shape[:2], -1)


def _starts(x: Tensor, starts: Tensor | None) -> np.ndarray:
    return np.zeros(x.shape[:2], np.bool_) if starts is None else array(starts)


def _run(loop: Any, x: Tensor, *arguments: Any) -> None:
    """Lanes are blocks of rows."""
    spread(loop, -(-x.numel() // x.shape[-1] // BLOCK), WORK * x.numel(), *arguments)


def _weight(weight: Tensor | None, x: Tensor) -> np.ndarray:
    return np.ones(x.shape[-1], np.float32) if weight is None else array(weight)


def _flat(x: Tensor) -> np.ndarray:
    return array(x).reshape(-1, x.shape[-1])


def _spread(loop: Any, x: Tensor, *arguments: Any, is_alone: bool = False) -> None:
    """Lanes are blocks of tokens, those of a row side by side; on one thread if `is_alone`."""
    lanes = len(x) * -(-x.shape[1] // BLOCK)
    if is_alone:
        loop(0, lanes, *arguments)
    else:
        spread(loop, lanes, WORK * x.numel(), *arguments)


def _tokens(x: Tensor, tail: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[np.ndarray, ...]:
    """x, those before, taps with their channels side by side, and how many tokens before it each token sees (B, T)."""
    most, places = tail.shape[1], torch.arange(x.shape[1], device=x.device)
    resets = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if reset is None else reset
    begun = torch.where(resets, places, -most).cummax(1).values
    return array(x), array(tail), array(weight.T), (places - begun).clamp(max=most).numpy()
