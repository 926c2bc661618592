"""Token loop of neural memory: the inner loss differentiated by torch, every token's weights formed. The definition."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.neural_memory.model import NORM_EPS, Model
from kernels.neural_memory.schedule import NeuralMemoryState, Row, join


def _memory(weights: Sequence[Tensor], x_SHD: Tensor, model: Model) -> Tensor:
    """M(x; W) of one token."""
    h = x_SHD
    for layer, w in enumerate(weights):
        h = (h[..., None, :] @ w)[..., 0, :]
        if layer < len(weights) - 1:
            h = functional.gelu(h) if model.activation == "gelu" else functional.silu(h)
    if model.norm is None:
        return h
    # written out: the inner gradient takes the first derivative, and of layer_norm torch's third is wrong
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
    return x_SHD + normed * model.norm[0] + model.norm[1]


def _loss(weights: Sequence[Tensor], k_SHK: Tensor, v_SHV: Tensor, model: Model) -> Tensor:
    """Inner loss, summed over sequences and heads, whose memories share nothing."""
    answer = _memory(weights, k_SHK, model)
    if model.loss == "huber":
        return functional.huber_loss(answer, v_SHV, reduction="sum", delta=model.threshold)
    error = answer - v_SHV
    if model.loss == "l2":
        return error.square().sum() / 2
    # a power below 2 has no second derivative at 0
    return error.abs().where(error != 0, 1).pow(model.threshold).where(error != 0, 0).sum() / model.threshold


def _sequences(
    tokens: Sequence[Tensor | None], state: NeuralMemoryState, chunk: int, model: Model
) -> tuple[Tensor, NeuralMemoryState]:
    """Sequences [S, T, H, X] of one length and one position in the chunk."""
    q, k, v, beta, g, momentum = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    now, speed, start = state[:3]
    position, outs = state.position[0], []
    for t in range(q.shape[1]):
        if position == 0:
            start = now
        grads: Any = torch.func.grad(_loss)(start, k[:, t], v[:, t], model)
        push = [-beta[:, t, :, None] * x for x in grads]
        if momentum is not None:
            speed = tuple(momentum[:, t, :, None].exp() * p + x for p, x in zip(speed, push, strict=True))
            push = list(speed)
        keep = 1.0 if g is None else g[:, t, :, None].exp()
        now = tuple(keep * w + x for w, x in zip(now, push, strict=True))
        outs.append(_memory(now, q[:, t], model))
        position = (position + 1) % chunk
    after = NeuralMemoryState(now, speed, now if position == 0 else start, (position,) * q.shape[0])
    return torch.stack(outs, dim=1), after


def neural_memory_reference(
    tokens_NHX: Sequence[Tensor | None], rows: Sequence[Row], state: NeuralMemoryState, chunk: int, model: Model
) -> tuple[Tensor, NeuralMemoryState]:
    """W_t = exp(g_t) W_{t-1} + P_t, P_t = exp(m_t) P_{t-1} - beta_t grad loss(W at the chunk's start; k_t, v_t).

    Returns:
        outputs M(q_t; W_t) [N, H, V] and the state after every sequence, as `schedule.run`.
    """
    outs, states = [], []
    if len({row[1:] for row in rows}) == 1 and rows[0].length:
        alike = [
            None if x is None else torch.stack([x[r.begin : r.begin + r.length] for r in rows]) for x in tokens_NHX
        ]
        out, after = _sequences(alike, state, chunk, model)
        return out.flatten(0, 1), after
    for s, row in enumerate(rows):
        part = [None if x is None else x[None, row.begin : row.begin + row.length] for x in tokens_NHX]
        after = state.take([s])
        if row.length:
            out, after = _sequences(part, after, chunk, model)
            outs.append(out[0])
        states.append(after)
    return torch.cat(outs), join(states)
