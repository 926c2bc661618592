"""A piece of a chunk at once, on any device: the dual form, for any depth, under autograd.

All gradients of a chunk are taken at its starting weights, so W at token t is a weighted sum of outer products,
W_t = a_t W + b_t P - sum over i <= t of c_ti x_i (x) delta_i, and is only ever multiplied, never formed:
h W_t = a_t (h W) + b_t (h P) - ((h X^T) * c) delta. With momentum the weights are two stacked decays,
c_ti = beta_i * sum over s in [i, t] of (decay of (s, t]) * (momentum of (i, s]); without it c is the decay alone.

Legend: S sequences, H heads, c tokens of the piece; W weights, P momentum [S, H, in, out].
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves autograd.Function.apply without types

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.neural_memory.model import Model, answer, slopes
from kernels.neural_memory.schedule import Advance, Piece

# tokens of a piece: coefficients are [c, c]
PIECE = 64


class _Decays(torch.autograd.Function):
    """Decay over (i, t] for i <= t, else 0 [S, H, c, c]; and from the start of the piece through t [S, H, c, 1].

    The gradient of a log decay is a sum over the intervals that hold it: the difference of running sums that autograd
    would take is rounding where a token wipes the memory.
    """

    @staticmethod
    def forward(ctx: Any, g_SHc1: Tensor) -> tuple[Tensor, Tensor]:
        # in float64 the difference of running sums is as good as the sum over the interval
        run = g_SHc1.double().cumsum(2)
        above = torch.ones(run.shape[2], run.shape[2], dtype=torch.bool, device=run.device).triu(1)
        between = (run - run.mT).masked_fill(above, -torch.inf).exp().to(g_SHc1.dtype)
        into = run.exp().to(g_SHc1.dtype)
        ctx.save_for_backward(between, into)
        return between, into

    @staticmethod
    def backward(ctx: Any, dbetween: Tensor, dinto: Tensor) -> Tensor:
        between, into = ctx.saved_tensors
        lower = torch.ones_like(between[0, 0]).tril()
        # entry (t, i) holds the decays of i < s <= t
        held = (((between * dbetween).tril(-1) @ lower.mT.triu(1)) * lower).sum(2)
        dg: Tensor = held[..., None] + lower.mT @ (into * dinto)
        return dg


def _advance(
    piece: Piece, now: tuple[Tensor, ...], momentum: tuple[Tensor, ...], start: tuple[Tensor, ...], *, model: Model
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    layers = range(len(now))
    found = answer(piece.k, len(now), lambda layer, h: h @ start[layer], model)
    deltas = slopes(found, piece.v, start, model)
    lower = torch.ones_like(piece.beta).expand(*piece.beta.shape[:3], piece.beta.shape[2]).tril()
    keep, into = (lower, torch.ones_like(piece.beta)) if piece.g is None else _Decays.apply(piece.g)
    step, carry = keep, None
    if piece.momentum is not None:
        speed, into_speed = _Decays.apply(piece.momentum)
        moving = keep if piece.valid is None else keep * piece.valid.mT
        step, carry = moving @ speed, moving @ into_speed
        push = speed[:, :, -1:].mT * piece.beta
    weight = step * piece.beta.mT

    def product(layer: int, h: Tensor) -> Tensor:
        read = into * (h @ now[layer])
        if carry is not None:
            read = read + carry * (h @ momentum[layer])
        return read - ((h @ found.inputs[layer].mT) * weight) @ deltas[layer]

    output = answer(piece.q, len(now), product, model).output
    after, pushed = [], []
    for layer in layers:
        inputs = found.inputs[layer]
        moved = into[:, :, -1:] * now[layer] - (inputs * weight[:, :, -1:].mT).mT @ deltas[layer]
        if carry is not None:
            moved = moved + carry[:, :, -1:] * momentum[layer]
            pushed.append(into_speed[:, :, -1:] * momentum[layer] - (inputs * push).mT @ deltas[layer])
        after.append(moved)
    return output, tuple(after), tuple(pushed)


def advance(model: Model) -> Advance:
    """The step of `schedule.run`."""
    return partial(_advance, model=model)
