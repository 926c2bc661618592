"""How far a generator's weights are from others, with gradients, where this is most of what a step costs.

    distance_t = sum over i of importance_ti (scale_i (V h_t + v - wanted_t)_i)^2

Generated numbers are longer than everything they are made from, so they are written once, into a buffer that is used
again in every step; differences, importance and scales are worked into it in place, and both gradients of the last
layer are read from it.

Shape legend: E width of an embedding, H units under the last layer, K chunks, M numbers of a chunk, N numbers of a
generated network, T conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from strategies._hypernet_layout import Layout, Ranges

Finish = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Units (T, K, H), weight (M, H) and bias (M,) of the last layer, N -> what a generator returns."""


MANY_ROWS = 64


def generated(units_TKH: Tensor, weight_MH: Tensor, bias_M: Tensor, num_numbers: int) -> Tensor:
    """(T, N) the numbers themselves; the surplus of the last chunk is cut off."""
    return F.linear(units_TKH, weight_MH, bias_M).flatten(1)[:, :num_numbers]


class Distances:
    """Squared distances from the last layer of a generator."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.buffer: Tensor | None = None
        """(T * K, M) of the last call, when its gradient has been taken."""

    def __call__(
        self,
        units_TKH: Tensor,
        weight_MH: Tensor,
        bias_M: Tensor,
        wanted_TN: Sequence[Tensor],
        importance_TN: Tensor | None = None,
        skipped: Sequence[Ranges] = (),
    ) -> Tensor:
        """(T,) as `Layout.distances` of the generated numbers."""
        found: Tensor = _FromUnits.apply(units_TKH, weight_MH, bias_M, wanted_TN, importance_TN, skipped, self)
        return found

    def borrowed(self, num_rows: int, like: Tensor) -> Tensor:
        """The buffer, which is whoever asked for it until it is given back."""
        buffer, self.buffer = self.buffer, None
        shape = (num_rows, len(like))
        is_fit = buffer is not None and buffer.shape == shape and buffer.dtype == like.dtype
        return buffer if is_fit and buffer.device == like.device else like.new_empty(shape)  # type: ignore[union-attr, return-value]


class _FromUnits(torch.autograd.Function):
    """Gradients of the scalars are worked into the units, which are few, and not into the numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        units_TKH: Tensor,
        weight_MH: Tensor,
        bias_M: Tensor,
        wanted_TN: Sequence[Tensor],
        importance_TN: Tensor | None,
        skipped: Sequence[Ranges],
        distances: Distances,
    ) -> Tensor:
        num, layout = len(units_TKH), distances.layout
        rows = units_TKH.flatten(0, 1)
        pull = torch.addmm(bias_M, rows, weight_MH.T, out=distances.borrowed(len(rows), bias_M))
        whole = pull.view(num, -1)
        whole[:, len(layout) :] = 0
        totals = []
        for k, (pull_N, wanted_N) in enumerate(zip(whole[:, : len(layout)], wanted_TN, strict=True)):
            pull_N.sub_(wanted_N)
            for start, stop in skipped[k] if k < len(skipped) else ():
                pull_N[start:stop] = 0
            totals.append(layout.weigh(pull_N, None if importance_TN is None else importance_TN[k]))
        ctx.save_for_backward(units_TKH, weight_MH)
        ctx.pull, ctx.distances = pull, distances
        return torch.stack(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Any, ...]:
        units_TKH, weight_MH = ctx.saved_tensors
        pull, twice_T11 = ctx.pull, 2 * gradient_T[:, None, None]
        of_units_TKH = (pull @ weight_MH).view(units_TKH.shape) * twice_T11
        # the bias is the weight of one more unit; which order of the product is faster depends on the number of rows
        rows = (F.pad(units_TKH, (0, 1), value=1.0) * twice_T11).flatten(0, 1)
        of_last = (rows.T @ pull).T if len(rows) > MANY_ROWS else pull.T @ rows
        ctx.distances.buffer, ctx.pull = pull, None
        return of_units_TKH, of_last[:, :-1], of_last[:, -1], None, None, None, None
