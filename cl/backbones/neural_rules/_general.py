"""Neural memories beyond `kernels.neural_memory`, a chunk at a time in torch; and the token loop of all of them.

    P_t = exp(m_t) P_{t-1} - eta_t G_t,  A_t = exp(g_t) A_{t-1} + P_t,  W_t = link(A_t),  o_t = M(q_t; W_t)
    G_t = sum over the window's tokens i of omega_i grad loss(M(k_i; W), v_i), W the weights at the chunk's start

With the orthogonal step P accumulates G alone, and A gets eta_t NewtonSchulz(P_t).

Shape legend: S sequences, H heads, c tokens of a piece, W tokens of a window, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl.backbones._state import State, mapped, where_rows
from cl.backbones.neural_rules._parts import LOSSES, RETENTIONS, Norm, Weights, ask, in_order, orthogonal
from kernels.neural_memory.model import Model, answer, slopes
from kernels.neural_memory.schedule import NeuralMemoryState, Piece, Row
from kernels.neural_memory.schedule import run as run_schedule

PIECE = 16
"""Tokens whose weights are formed at once, each a copy of the memory."""


@dataclass(frozen=True)
class Recipe:
    """How a memory is judged, kept and stepped; `option` is the retention's."""

    loss: str = "l2"
    retention: str = "plain"
    option: float = 0.0
    step: str = "gradient"
    window: int = 1

    def weights(self, a: Weights) -> Weights:
        """What the memory answers with, from its accumulators."""
        return tuple(RETENTIONS[self.retention](x, self.option) for x in a)


@dataclass(frozen=True)
class Tokens:
    """What a memory reads.

    Args:
        q: (B, T, H, K). k: (B, T, H, W, K), v: (B, T, H, W, V): the window's keys and values.
        omega: (B, T, H, W) weights of the window's tokens.
        eta: (B, T, H) step sizes. g, momentum: (B, T, H) log decays, of the memory and of the momentum, or None.
        threshold: (B, T, H) of the loss.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    omega: Tensor
    eta: Tensor
    g: Tensor | None
    momentum: Tensor | None
    threshold: Tensor


# chunks


def chunked(
    tokens: Tokens, state: NeuralMemoryState, rows: list[Row], chunk: int, recipe: Recipe, norm: Norm | None
) -> tuple[Tensor, NeuralMemoryState]:
    """Outputs (B * T, H, V) and the state after every sequence."""

    def flat(x: Tensor | None, trailing: int = 1) -> Tensor | None:
        return None if x is None else x.reshape(-1, x.shape[2], x[0, 0, 0].numel() if trailing else 1)

    control = torch.cat((tokens.eta[..., None], tokens.threshold[..., None], tokens.omega), -1)
    given = [flat(x) for x in (tokens.q, tokens.k, tokens.v, control, tokens.g, tokens.momentum)]

    def advance(piece: Piece, now: Weights, momentum: Weights, start: Weights) -> tuple[Tensor, Weights, Weights]:
        return _advance(piece, now, momentum, start, recipe, norm)

    return run_schedule(advance, given, rows, state, chunk, PIECE, save_memory=False)


def _advance(
    piece: Piece, now: Weights, speed: Weights, start: Weights, recipe: Recipe, norm: Norm | None
) -> tuple[Tensor, Weights, Weights]:
    eta, threshold, omega = piece.beta.split((1, 1, piece.beta.shape[-1] - 2), -1)
    if piece.valid is not None:
        # idle tokens have no threshold; their gradients are dropped, but must be finite
        threshold = torch.where(piece.valid, threshold, 2.0)
    gradients = _gradients(piece, omega, threshold.squeeze(-1), recipe, recipe.weights(start), norm)
    if piece.valid is not None:
        gradients = [x * piece.valid[..., None] for x in gradients]
    if recipe.step == "gradient":
        gradients = [eta[..., None] * x for x in gradients]
    if piece.momentum is None:
        pushes, pushed = [-x for x in gradients], speed
    else:
        between, into = _decays(piece.momentum)
        pushes = [_accumulated(between, into, -x, p) for x, p in zip(gradients, speed, strict=True)]
        pushed = tuple(x[:, :, -1] for x in pushes)
    if recipe.step == "orthogonal":
        pushes = [eta[..., None] * orthogonal(x) for x in pushes]
    if piece.valid is not None:
        pushes = [x * piece.valid[..., None] for x in pushes]
    between, into = _decays(torch.zeros_like(eta) if piece.g is None else piece.g)
    after = [_accumulated(between, into, x, a) for x, a in zip(pushes, now, strict=True)]
    weights = recipe.weights(tuple(after))
    model = Model("gelu", "l2", 1.0, norm)
    read = answer(piece.q, len(weights), lambda i, h: (h.unsqueeze(-2) @ weights[i]).squeeze(-2), model)
    return read.output, tuple(a[:, :, -1] for a in after), pushed


def _gradients(
    piece: Piece, omega: Tensor, threshold: Tensor, recipe: Recipe, start: Weights, norm: Norm | None
) -> list[Tensor]:
    """Of every token's windowed loss, by the weights of every layer: (S, H, c, in, out)."""
    size = omega.shape[-1]
    k = piece.k.unflatten(-1, (size, -1)).flatten(2, 3)
    v = piece.v.unflatten(-1, (size, -1)).flatten(2, 3)
    model = Model("gelu", "l2", 1.0, norm)
    found = answer(k, len(start), lambda i, h: h @ start[i], model)
    slope = LOSSES[recipe.loss][1](found.output - v, threshold.repeat_interleave(size, 2))
    # the squared error of this target has the slope of the loss that is meant
    deltas = slopes(found, found.output - omega.flatten(2).unsqueeze(-1) * slope, start, model)
    return [
        x.unflatten(2, (-1, size)).mT @ d.unflatten(2, (-1, size)) for x, d in zip(found.inputs, deltas, strict=True)
    ]


def _decays(log_SHc1: Tensor) -> tuple[Tensor, Tensor]:
    """Decay over (i, t] for i <= t, else 0 (S, H, c, c); and from the start of the piece through t (S, H, c, 1)."""
    run = log_SHc1.double().cumsum(2)
    above = torch.ones(run.shape[2], run.shape[2], dtype=torch.bool, device=run.device).triu(1)
    between = (run - run.mT).masked_fill(above, -torch.inf).exp()
    return between.to(log_SHc1.dtype), run.exp().to(log_SHc1.dtype)


def _accumulated(between: Tensor, into: Tensor, x_SHcIO: Tensor, before_SHIO: Tensor) -> Tensor:
    """a_t = decay_t a_{t-1} + x_t at every token."""
    summed = (between @ x_SHcIO.flatten(3)).view(x_SHcIO.shape)
    return summed + into.unsqueeze(-1) * before_SHIO.unsqueeze(2)


# tokens


def walked(
    tokens: Tokens,
    state: State,
    fresh: State,
    reset_BT: Tensor | None,
    chunk: int,
    recipe: Recipe,
    norm: Norm | None,
) -> tuple[Tensor, State]:
    """One token after the other, the loss differentiated by torch: the oracle, of `kernels.neural_memory` too.

    Returns:
        outputs (B, T, H, V) and the state after the last token.
    """
    layers, outs = sorted(state["weights"], key=int), []
    for t in range(tokens.q.shape[1]):
        if reset_BT is not None:
            state = where_rows(reset_BT[:, t], fresh, state)
        state = state | {"start": where_rows(state["position"] == 0, state["weights"], state["start"])}
        start = recipe.weights(in_order(state["start"]))
        at = tokens.k[:, t], tokens.v[:, t], tokens.omega[:, t], tokens.threshold[:, t]

        def loss(weights: Weights, at: tuple[Tensor, ...] = at) -> Tensor:
            k, v, omega, threshold = at
            each = LOSSES[recipe.loss][0](ask(weights, k, norm) - v, threshold[..., None].expand(omega.shape))
            return (omega * each).sum()

        gradient = dict(zip(layers, torch.func.grad(loss)(start), strict=True))
        eta, g = tokens.eta[:, t, :, None, None], tokens.g
        push = mapped(lambda x, eta=eta: -x if recipe.step == "orthogonal" else -eta * x, gradient)
        if tokens.momentum is not None:
            rate = tokens.momentum[:, t, :, None, None].exp()
            push = mapped(lambda x, p, rate=rate: rate * p + x, push, state["momentum"])
            state = state | {"momentum": push}
        if recipe.step == "orthogonal":
            push = mapped(lambda x, eta=eta: eta * orthogonal(x), push)
        keep = 1.0 if g is None else g[:, t, :, None, None].exp()
        now = mapped(lambda a, x, keep=keep: keep * a + x, state["weights"], push)
        weights = recipe.weights(in_order(now))
        outs.append(ask(weights, tokens.q[:, t].unsqueeze(2), norm).squeeze(2))
        state = state | {"weights": now, "position": (state["position"] + 1) % chunk}
    after = where_rows(state["position"] == 0, state["weights"], state["start"])
    return torch.stack(outs, 1), state | {"start": after}
