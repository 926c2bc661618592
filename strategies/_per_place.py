"""Sums over rows of a function of each row's own gradient by the weights of a convolution.

The gradient of one row is a sum over places of outer products, one matrix product for each row:

    G = sum over places p of delta_p a_p^T = delta @ patches,    patches_p: what the kernel reads at p

What limits this is memory, so patches are copied out of the map in long runs, and as many rows are written down at
once as stay in a cache, over those before. Maps of few places are not written down at all: squares are again one
matrix product, over pairs of places,

    sum over rows of (sum_p delta_p a_p^T)^2 = sum over rows and p, q of (delta_p delta_q) (a_p a_q)^T

Measured on one thread, us a row: 20 to 20 channels, 3x3, 32x32 places 165 on an EPYC, 240 to 380 on a busy Xeon (with
`F.unfold` 1200); 160 to 160 at 4x4 140 and 300 (930 with rows in new memory); at 2x2, on the Xeon, 160 by pairs, 300
written down.

Shape legend: B rows, n of them at once, P places, I numbers under a kernel, O channels of the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]

IN_PLACE: dict[Function, Function] = {torch.square: torch.square_, torch.abs: torch.abs_}
"""Functions with f(uv) = f(u) f(v), and what does the same to a tensor that is no longer needed."""
FEW_PLACES = 4
"""At most so many, pairs of places cost less than rows: P (P + 1) / 2 products, against P and three walks."""
MAX_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Held at once, of rows' gradients or of patches: on a CPU 2 MB, in its shared cache; a quarter of that, which a core's
own holds, costs up to a sixth more time for its calls. Elsewhere what keeps the device busy."""


def summed_over_places(layer: nn.Conv2d, a: Tensor, delta: Tensor, function: Function) -> Tensor:
    """Sum over rows of `function` of the gradient by the weight.

    Args:
        a: (B, I / kernel size, height, width) inputs, in either memory format.
        delta: (B, O, height, width) gradient of each row's loss by its outputs.

    Returns:
        in the shape of the weight.

    Cost: 2 O I P operations a row, as the backward pass has for this layer.
    """
    has_places_first, windows = _windows(layer, a, delta)
    delta_BOP = delta.flatten(2)
    num_places, num_inputs = delta_BOP.shape[2], layer.weight[0].numel()
    is_square, is_multiplicative = function is torch.square, function in IN_PLACE
    if num_places == 1 and is_multiplicative:
        total_OI = function(delta_BOP[:, :, 0]).T @ function(windows.reshape(len(a), num_inputs))
    elif num_places <= FEW_PLACES and is_square:
        total_OI = _by_pairs(delta_BOP, _as_patches(windows.contiguous(), has_places_first, num_inputs))
    else:
        total_OI = _by_rows(delta_BOP, windows, has_places_first, num_inputs, IN_PLACE.get(function, function))
    if not has_places_first:
        return total_OI.view_as(layer.weight)
    return total_OI.view(len(layer.weight), *windows.shape[3:]).permute(0, 3, 1, 2)


def _windows(layer: nn.Conv2d, a: Tensor, delta: Tensor) -> tuple[bool, Tensor]:
    """A view of what the kernel reads at each place: (B, height, width, kernel, channels) or (B, channels, kernel,
    height, width), whichever is copied in longer runs; and whether it is the first."""
    if isinstance(layer.padding, str):
        raise ValueError(f"the padding of a convolution is {layer.padding!r}; it must be given in numbers")
    (stride_y, stride_x), (step_y, step_x), (pad_y, pad_x) = layer.stride, layer.dilation, layer.padding
    channels, (height, width), kernel = a.shape[1], delta.shape[2:], layer.kernel_size
    has_places_first = channels * (kernel[1] if step_x == 1 else 1) >= (width if stride_x == 1 else 1)
    if has_places_first:
        a = F.pad(a.permute(0, 2, 3, 1).contiguous(), (0, 0, pad_x, pad_x, pad_y, pad_y))
        row, y, x, c = a.stride()
        sizes, strides = (height, width, *kernel, channels), (y * stride_y, x * stride_x, y * step_y, x * step_x, c)
    else:
        a = F.pad(a.contiguous(), (pad_x, pad_x, pad_y, pad_y))
        row, c, y, x = a.stride()
        sizes, strides = (channels, *kernel, height, width), (c, y * step_y, x * step_x, y * stride_y, x * stride_x)
    return has_places_first, a.as_strided((len(a), *sizes), (row, *strides))


def _as_patches(windows: Tensor, has_places_first: bool, num_inputs: int) -> Tensor:
    """Contiguous windows as (B, P, I)."""
    if has_places_first:
        return windows.view(len(windows), -1, num_inputs)
    return windows.view(len(windows), num_inputs, -1).transpose(1, 2)


def _by_rows(delta_BOP: Tensor, windows: Tensor, has_places_first: bool, num_inputs: int, function: Function) -> Tensor:
    """Write a few rows down, again and again in the same memory; `function` may overwrite them."""
    num_rows, num_outputs, num_places = delta_BOP.shape
    most = MAX_NUMBERS.get(delta_BOP.device.type, MAX_NUMBERS["cuda"]) // (num_inputs * max(num_outputs, num_places))
    size = min(max(1, most), num_rows)
    copied, rows_nOI = windows.new_empty(size, *windows.shape[1:]), windows.new_empty(size, num_outputs, num_inputs)
    ones, total = windows.new_ones(1, size), windows.new_zeros(1, num_outputs * num_inputs)
    for delta_nOP, some in zip(delta_BOP.split(size), windows.split(size), strict=True):
        num = len(some)
        patches_nPI = _as_patches(copied[:num].copy_(some), has_places_first, num_inputs)
        torch.bmm(delta_nOP, patches_nPI, out=rows_nOI[:num])
        # a product with ones reads the rows once, and adds in the same walk
        total.addmm_(ones[:, :num], function(rows_nOI[:num]).view(num, -1))
    return total.view(num_outputs, num_inputs)


def _by_pairs(delta_BOP: Tensor, patches_BPI: Tensor) -> Tensor:
    """Squares, as products over pairs of places; a pair of two places counts twice."""
    p, q = torch.triu_indices(delta_BOP.shape[2], delta_BOP.shape[2], device=delta_BOP.device)
    weight = 2.0 - (p == q).to(delta_BOP)
    delta_BPO = delta_BOP.transpose(1, 2)
    outputs, inputs = weight[:, None] * delta_BPO[:, p] * delta_BPO[:, q], patches_BPI[:, p] * patches_BPI[:, q]
    return outputs.flatten(0, 1).T @ inputs.flatten(0, 1)
