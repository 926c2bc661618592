"""Tensors of which only bounds are known, and what layers make of them (interval bound propagation).

    low <= x <= up, element by element;   x in the box and w in the box  =>  f(x, w) in the box that f returns

An `Interval` goes through the code of a backbone as a tensor would: each torch function it meets is replaced by one on
bounds. Functions that do not fall in any of their arguments are taken at both ends; products are bounded by

    point x, box w:    x+ w_low + x- w_up           <= x w <=  x+ w_up + x- w_low
    box x, point w:    c w - r |w|                  <= x w <=  c w + r |w|,          c, r the centre and radius of x
    box x, box w:      x+ and x- apart, each        p_low w_low+ + p_up w_low-  <=  p w  <=  p_up w_up+ + p_low w_up-

which is exact for a single product where x does not change its sign, as after a ReLU, and sound everywhere. Batch norm
is bounded with its running statistics. Anything else raises `Unbounded`.

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018; for weights in boxes, Krukowski et
al., 2024 (`hyper_interval`), whose form needs inputs of at least 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Product = Callable[[Tensor, Tensor], Tensor]


class Unbounded(NotImplementedError):
    """No bounds are known for a function; the message is its name."""


class Interval(Tensor):
    """Both ends of a box, in one tensor (2, ...) that shows the shape of the box."""

    @staticmethod
    def of(low: Tensor, up: Tensor) -> Interval:
        return torch.stack([low, up]).as_subclass(Interval)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in ABOUT_THE_BOX:
                return func(ends(args[0])[0], *args[1:], **kwargs)
            if name in ABOUT_THE_TENSOR:
                return func(*args, **kwargs)
            if name in RULES:
                return RULES[name](*args, **kwargs)
            if name in NEVER_FALLING and not _falls(name, kwargs):
                return (_in_place if kwargs.get("inplace") else _at_both_ends)(func, args, kwargs)
        raise Unbounded(name)


def _falls(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether an option turns a rising function into another one; dropout draws other units at each end."""
    alpha = kwargs.get("alpha", 1)
    slopes = {"add": alpha, "elu": alpha, "leaky_relu": kwargs.get("negative_slope", 0)}
    return slopes.get(name, 0) < 0 or (name == "dropout" and kwargs.get("training", True))


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper end; twice the tensor where it is a point."""
    if not isinstance(x, Interval):
        return x, x
    with torch._C.DisableTorchFunctionSubclass():
        low, up = x.as_subclass(Tensor).unbind(0)
    return low, up


def _at_both_ends(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    results = []
    for side in (0, 1):
        one = [
            tree_map(lambda v, side=side: ends(v)[side] if isinstance(v, Interval) else v, a) for a in (args, kwargs)
        ]
        results.append(tree_flatten(func(*one[0], **one[1])))
    (lows, shape), (ups, _) = results
    return tree_unflatten([Interval.of(*pair) for pair in zip(lows, ups, strict=True)], shape)


def _in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The interval becomes the result, under every name that it goes on; gradients are taken at what it was."""
    x, *others = args
    both = x.as_subclass(Tensor)
    found = _at_both_ends(func, (both.clone().as_subclass(Interval), *others), kwargs | {"inplace": False})
    both.copy_(found.as_subclass(Tensor))
    return x


def _product(multiply: Product, x: Tensor, w: Tensor) -> Tensor:
    """Bounds of a sum of products of an element of x and one of w, whatever sum it is."""
    if not isinstance(w, Interval):
        low, up = ends(x)
        centre, radius = multiply((low + up) / 2, w), multiply((up - low) / 2, w.abs())
        return Interval.of(centre - radius, centre + radius)
    w_low, w_up = ends(w)
    if not isinstance(x, Interval):
        above, below = x.clamp(min=0), x.clamp(max=0)
        low = multiply(above, w_low) + multiply(below, w_up)
        return Interval.of(low, multiply(above, w_up) + multiply(below, w_low))
    x_low, x_up = ends(x)
    low, up = _nonnegative_product(multiply, x_low.clamp(min=0), x_up.clamp(min=0), w_low, w_up)
    if bool((x_low < 0).any()):
        # the part of x below 0, with its sign turned
        down = _nonnegative_product(multiply, (-x_up).clamp(min=0), (-x_low).clamp(min=0), w_low, w_up)
        low, up = low - down[1], up - down[0]
    return Interval.of(low, up)


def _nonnegative_product(
    multiply: Product, low: Tensor, up: Tensor, w_low: Tensor, w_up: Tensor
) -> tuple[Tensor, Tensor]:
    lowest = multiply(low, w_low.clamp(min=0)) + multiply(up, w_low.clamp(max=0))
    return lowest, multiply(up, w_up.clamp(min=0)) + multiply(low, w_up.clamp(max=0))


def _shifted(x: Tensor, by: Tensor | None) -> Tensor:
    if by is None:
        return x
    return Interval.of(*(a + b for a, b in zip(ends(x), ends(by), strict=True)))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _shifted(_product(F.linear, x, weight), bias)


def _convolution(convolve: Any) -> Any:
    def bounded(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        found = _product(lambda a, w: convolve(a, w, None, *args, **kwargs), x, weight)
        if bias is None:
            return found
        # one number a channel, which comes after the rows
        num_places = ends(found)[0].dim() - 2
        low, up = (b.view(-1, *[1] * num_places) for b in ends(bias))
        return _shifted(found, Interval.of(low, up))

    return bounded


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or mean is None or variance is None:
        raise Unbounded("batch_norm with the statistics of the batch")
    low, up = ends(x)
    view = (1, -1, *[1] * (low.dim() - 2))
    scale = (variance + eps).rsqrt().view(view)
    found: Tensor = Interval.of(*((end - mean.view(view)) * scale for end in (low, up)))
    if weight is not None:
        found = _multiplied(found, Interval.of(*(end.view(view) for end in ends(weight))))
    return found if bias is None else _shifted(found, Interval.of(*(end.view(view) for end in ends(bias))))


def _multiplied(x: Any, y: Any) -> Tensor:
    """Element by element."""
    pairs = [[v] if not isinstance(v, Tensor) else list(ends(v)) for v in (x, y)]
    products = [a * b for a in pairs[0] for b in pairs[1]]
    low = up = products[0]
    for product in products[1:]:
        low, up = torch.minimum(low, product), torch.maximum(up, product)
    return Interval.of(low, up)


def _divided(x: Any, y: Any) -> Tensor:
    if isinstance(y, Interval):
        raise Unbounded("division by an interval")
    return _multiplied(x, 1 / y)


def _negative(x: Tensor) -> Tensor:
    low, up = ends(x)
    return Interval.of(-up, -low)


def _difference(x: Any, y: Any) -> Tensor:
    (x_low, x_up), (y_low, y_up) = (ends(v) if isinstance(v, Tensor) else (v, v) for v in (x, y))
    return Interval.of(x_low - y_up, x_up - y_low)


def _added_in_place(x: Tensor, y: Any, **options: Any) -> Tensor:
    """Where the sum goes on under two names, both must be it."""
    if not isinstance(x, Interval) or options:
        raise Unbounded("add_ with options, or to a tensor that is no interval")
    y_low, y_up = ends(y) if isinstance(y, Tensor) else (y, y)
    both = x.as_subclass(Tensor)
    both[0] += y_low
    both[1] += y_up
    return x


RULES: dict[str, Any] = {
    "add_": _added_in_place,
    "__iadd__": _added_in_place,
    "linear": _linear,
    "matmul": lambda x, w: _product(torch.matmul, x, w),
    "__matmul__": lambda x, w: _product(torch.matmul, x, w),
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "conv3d": _convolution(F.conv3d),
    "batch_norm": _batch_norm,
    "mul": _multiplied,
    "__mul__": _multiplied,
    "__rmul__": _multiplied,
    "div": _divided,
    "true_divide": _divided,
    "__truediv__": _divided,
    "neg": _negative,
    "__neg__": _negative,
    "sub": _difference,
    "__sub__": _difference,
    "__rsub__": lambda x, y: _difference(y, x),
}
_NEVER_FALLING = """
    relu relu6 leaky_relu elu selu celu softplus hardtanh hardsigmoid log_sigmoid sigmoid tanh clamp exp dropout
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    mean sum amax amin cumsum add __add__ __radd__ cat concat stack where pad
    flatten unflatten view reshape permute transpose t T mT squeeze unsqueeze expand expand_as contiguous clone detach
    to float double __getitem__ split chunk unbind narrow select index_select
"""
_ABOUT_THE_BOX = "shape size dim ndim numel nelement __len__ stride"
_ABOUT_THE_TENSOR = """
    dtype device layout requires_grad grad_fn is_leaf is_cuda is_floating_point is_complex is_sparse output_nr grad
    _backward_hooks register_hook retain_grad data_ptr __repr__ __hash__ as_subclass
"""
NEVER_FALLING = frozenset(_NEVER_FALLING.split())
"""None of these falls when an argument that may be an interval rises; most only move numbers."""
ABOUT_THE_BOX, ABOUT_THE_TENSOR = frozenset(_ABOUT_THE_BOX.split()), frozenset(_ABOUT_THE_TENSOR.split())
SUPPORTED = "Linear, Conv1d to Conv3d, BatchNorm, ReLU and other rising activations, and pooling"
"""For sentences that refuse another one."""
