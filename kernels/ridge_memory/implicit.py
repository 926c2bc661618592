"""Ridge solves over time and their implicit gradient, composed of kernels that exist: the same for every backend.

An engine has `attention` (gated linear attention), `scan` (the diagonal recurrence) and `solve` (Chebyshev).

|H_t|^2 =: n_t follows n_t = exp(2 g_t) n_{t-1} + 2 beta_t y_t - (beta_t |k_t|^2)^2, y_t = k_t^T H_t k_t.
So everything the loss feels of H_t, through the solve and through lambda_t, is a matrix of rank one per token:
-z_t x_t^T from the solve (z the solution for the incoming gradient) and 2 beta_t nbar_t k_t k_t^T from y_t, with nbar
the reverse scan of dn. Their sums over time are two backward passes of gated linear attention with keys k and
values beta k; nothing is differentiated through the iterations.
"""

from typing import Any

import torch
from torch import Tensor

SCAN_CHUNK = 32


def _weighted(x: Tensor, beta: Tensor | None) -> Tensor:
    return x if beta is None else x * beta[..., None]


def forward(
    engine: Any,
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x [B, T, H, K], the last H [S, H, K, K], n and y [B, T, H], and the kept chunk states."""
    m, final, states = engine.attention.forward(k, k, _weighted(k, beta), g, h0, cu_seqlens, 1.0, chunk, True)
    y, size = (k * m).sum(-1), k.square().sum(-1)
    weight = torch.ones_like(y) if beta is None else beta
    decay = torch.ones_like(y) if g is None else (2 * g).exp()
    n, _ = engine.scan.forward(
        decay, 2 * weight * y - (weight * size).square(), h0.square().sum((-1, -2)), cu_seqlens, SCAN_CHUNK
    )
    n = n.clamp_min(0)
    x = engine.solve(q, k, beta, g, n.sqrt(), states, cu_seqlens, ratio, floor, steps, chunk, fast)
    return x, final, n, y, states


def backward(
    engine: Any,
    dx: Tensor,
    dfinal: Tensor,
    x: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    h0: Tensor,
    n: Tensor,
    y: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, beta, g and h0."""
    norm = n.sqrt()
    z = engine.solve(dx, k, beta, g, norm, states, cu_seqlens, ratio, floor, steps, chunk, fast)
    # lambda = ratio * sqrt(n) + floor; where there is no H yet, lambda does not move
    dn = (z * x).sum(-1).mul_(-ratio / 2).div_(norm).masked_fill_(norm == 0, 0)
    weight = torch.ones_like(y) if beta is None else beta
    decay = torch.ones_like(y) if g is None else (2 * g).exp()
    n0 = h0.square().sum((-1, -2))
    ddecay, nbar, dn0 = engine.scan.backward(dn, torch.zeros_like(n0), decay, n, n0, cu_seqlens, SCAN_CHUNK)
    values = _weighted(k, beta)
    rest = (k, values, g, states, cu_seqlens, 1.0, chunk)
    _, dk, dv, dg, dh0 = engine.attention.backward(-x, dfinal, z, *rest)
    read = _weighted(k, 2 * weight * nbar)
    dq_y, dk_y, dv_y, dg_y, dh0_y = engine.attention.backward(read, torch.zeros_like(dfinal), k, *rest)
    size, dv = k.square().sum(-1), dv + dv_y
    # y_t = k_t^T (H_t k_t): once as the query, once outside
    dk = dk + dk_y + 2 * dq_y + _weighted(dv, beta) - _weighted(k, 4 * nbar * weight.square() * size)
    dbeta = None if beta is None else (dv * k).sum(-1) + 2 * nbar * (y - beta * size.square())
    dgate = None if g is None else dg + dg_y + 2 * decay * ddecay
    return z, dk, dbeta, dgate, dh0 + dh0_y + 2 * dn0[..., None, None] * h0
