"""A piece of a chunk at once: the dual form, for any depth, under autograd. On Triton, and where pieces are made again.

All gradients of a chunk are taken at its starting weights, so W at token t is a weighted sum of outer products,
W_t = a_t W + b_t P - sum over i <= t of c_ti x_i (x) delta_i, and is only ever multiplied, never formed:
h W_t = a_t (h W) + b_t (h P) - ((h X^T) * c) delta. The step beta_i is in delta_i: slopes are linear in it. With
momentum the coefficients are two stacked decays, c_ti = sum over s in [i, t] of (decay of (s, t]) * (momentum of
(i, s]); without it c is the decay alone.

Legend: S sequences, H heads, c tokens of the piece; W weights, P momentum [S, H, in, out].
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves autograd.Function.apply without types

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.common.chunks import WIPED
from kernels.neural_memory.model import Model, answer, slopes
from kernels.neural_memory.schedule import Piece

# tokens of a piece: coefficients are [c, c]
PIECE = 64


class _Decays(torch.autograd.Function):
    """Decay over (i, t] for i <= t, else 0 [S, H, c, c]; and from the start of the piece through t [S, H, c, 1].

    The gradient of a log decay is a sum over the intervals that hold it: the difference of running sums that autograd
    would take is rounding where a token wipes the memory.
    """

    @staticmethod
    def forward(ctx: Any, g_SHc1: Tensor) -> tuple[Tensor, Tensor]:
        # in float64 the difference of running sums is as good as the sum over the interval, wipes among them or not
        run = g_SHc1.double().clamp(min=WIPED).cumsum(2)
        # above the diagonal there is no interval: cut before too, since exp is slow where it leaves the range of floats
        # what is returned is not written over: compiled by torch 2.11, it would have no gradient
        between = (run - run.mT).to(g_SHc1.dtype).tril_().exp_().tril()
        into = run.to(g_SHc1.dtype).exp()
        ctx.save_for_backward(between, into)
        return between, into

    @staticmethod
    def backward(ctx: Any, dbetween: Tensor, dinto: Tensor) -> Tensor:
        between, into = ctx.saved_tensors
        lower = torch.ones_like(between[0, 0]).tril()
        # entry (t, i) holds the decays of i < s <= t
        held = ((between * dbetween).tril_(-1) @ lower.mT.triu(1)).mul_(lower).sum(2)
        dg: Tensor = held[..., None] + lower.mT @ (into * dinto)
        return dg


class Coefficients(NamedTuple):
    """What tokens of a piece, and the state after it, hold of what was before and of every token's outer product.

    into, carry [S, H, c, 1]: of W and of P in W_t. step [S, H, c, c]: of token i in W_t. slowed [S, H, 1, 1] and push
    [S, H, c, 1]: of P and of token i in the P after the piece. The last three of P are None without momentum.
    """

    into: Tensor
    step: Tensor
    carry: Tensor | None = None
    slowed: Tensor | None = None
    push: Tensor | None = None


def coefficients(g: Tensor | None, momentum: Tensor | None, valid: Tensor | None, like: Tensor) -> Coefficients:
    """From the gates [S, H, c, 1]: two stacked decays, the same for every layer; `like` is [S, H, c, X]."""
    one = torch.ones_like(like[..., :1])
    lower = one.expand(*like.shape[:3], like.shape[2]).tril()
    keep, into = (lower, one) if g is None else _Decays.apply(g)
    if momentum is None:
        return Coefficients(into, keep)
    speed, into_speed = _Decays.apply(momentum)
    moving = keep if valid is None else keep * valid.mT
    step, carry = moving @ speed, moving @ into_speed
    return Coefficients(into, step, carry, into_speed[:, :, -1:], speed[:, :, -1:].mT)


# (queries h, keys x, slopes delta of one layer, W, P, coefficients) -> h W_t for every token t, W and P after the piece
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Coefficients], tuple[Tensor, Tensor, Tensor | None]]


def _layer(
    h: Tensor, x: Tensor, delta: Tensor, now: Tensor, momentum: Tensor | None, c: Coefficients
) -> tuple[Tensor, Tensor, Tensor | None]:
    read = c.into * (h @ now) - ((h @ x.mT) * c.step) @ delta
    after = c.into[:, :, -1:] * now - (x * c.step[:, :, -1:].mT).mT @ delta
    if momentum is None or c.carry is None or c.slowed is None or c.push is None:
        return read, after, None
    read = read + c.carry * (h @ momentum)
    after = after + c.carry[:, :, -1:] * momentum
    return read, after, c.slowed * momentum - (x * c.push).mT @ delta


def advance(
    piece: Piece,
    now: tuple[Tensor, ...],
    momentum: tuple[Tensor, ...],
    start: tuple[Tensor, ...],
    *,
    model: Model,
    layer: Layer = _layer,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The step of `schedule.run`: keys through the weights of the chunk's start, queries through their own."""
    found = answer(piece.k, len(now), lambda i, h: h @ start[i], model)
    deltas = slopes(found, piece.v, start, model, piece.beta)
    c = coefficients(piece.g, piece.momentum, piece.valid, piece.q)
    after: list[Tensor] = []
    pushed: list[Tensor] = []

    def product(i: int, h: Tensor) -> Tensor:
        read, w, p = layer(h, found.inputs[i], deltas[i], now[i], momentum[i] if momentum else None, c)
        after.append(w)
        pushed.extend([] if p is None else [p])
        return read

    output = answer(piece.q, len(now), product, model).output
    return output, tuple(after), tuple(pushed)
