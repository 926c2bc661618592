"""What a neural memory is put together from: an answer, a loss, a retention, a step, and features of its keys.

Weights are a tuple of matrices (..., in, out), one a layer; several memories side by side in the leading axes.

Shape legend: S sequences, H heads, N tokens, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]
Norm = tuple[Tensor, Tensor]


def in_order(by_layer: Mapping[str, Tensor]) -> Weights:
    """Weights of the layers "0", "1", .. "10" as a state keeps them, one after the other."""
    return tuple(by_layer[number] for number in sorted(by_layer, key=int))


def ask(weights: Sequence[Tensor], x: Tensor, norm: Norm | None) -> Tensor:
    """M(x; W) of tokens (S, H, N, K): layers with GELU between; with `norm`, x + LayerNorm(.)."""
    h = x
    for layer, w in enumerate(weights):
        h = (F.gelu(h) if layer else h) @ w
    if norm is None:
        return h
    gamma, bias = (p[:, None] for p in norm)
    return x + F.layer_norm(h, h.shape[-1:], eps=1e-6) * gamma + bias


# losses: (error, threshold) -> value of each token, and its slope by the error; thresholds (S, H, N)


def l2(error: Tensor, threshold: Tensor) -> Tensor:
    """|e|^2 / 2."""
    return error.square().sum(-1) / 2


def l2_slope(error: Tensor, threshold: Tensor) -> Tensor:
    return error


def lp(error: Tensor, threshold: Tensor) -> Tensor:
    """sum |e|^p / p, p the threshold."""
    powers = _size(error).pow(threshold[..., None]).masked_fill(error == 0, 0)
    return (powers / threshold[..., None]).sum(-1)


def lp_slope(error: Tensor, threshold: Tensor) -> Tensor:
    return error.sign() * _size(error).pow(threshold[..., None] - 1)


def _size(error: Tensor) -> Tensor:
    """|e|, and 1 where e is 0: there a power below 1 has no slope, and p below 2 needs one."""
    return error.abs().masked_fill(error == 0, 1)


def switched(error: Tensor, threshold: Tensor) -> Tensor:
    """|e|^2 / 2 where |e| is at most the threshold, threshold * |e|_1 beyond."""
    is_far = error.square().sum(-1) > threshold.square()
    return torch.where(is_far, threshold * error.abs().sum(-1), l2(error, threshold))


def switched_slope(error: Tensor, threshold: Tensor) -> Tensor:
    is_far = (error.square().sum(-1) > threshold.square())[..., None]
    return torch.where(is_far, threshold[..., None] * error.sign(), error)


Judge = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Judge, Judge]] = {
    "l2": (l2, l2_slope),
    "lp": (lp, lp_slope),
    "switched": (switched, switched_slope),
}
"""By name: the loss and its slope."""


# retentions: the accumulator A, which gradients are added to and which decays, -> the weights; option q or c


def plain(a: Tensor, option: float) -> Tensor:
    """W = A: decay is the retention."""
    return a


def normalised(a: Tensor, q: float) -> Tensor:
    """W = A / |A|_q^(q - 2), over all entries of a matrix."""
    # a general power is several times slower than the source's own q
    raised = a.square().square() if q == 4 else a.abs().pow(q)
    size = raised.sum((-2, -1), keepdim=True) + 1e-12
    return a * size.pow((2 - q) / q)


def simplex(a: Tensor, c: float) -> Tensor:
    """W = c softmax(A), each output's weights on a simplex; A is log W up to a constant, which softmax does not see."""
    return c * a.softmax(-2)


RETENTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "plain": plain,
    "normalised": normalised,
    "simplex": simplex,
}


# steps: what of the momentum is added


def orthogonal(p: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: about U V^T of the singular value decomposition of each matrix, as Muon has it.

    Every step multiplies by a polynomial of the Gram matrix of the short side, and so does the next one's Gram matrix:
    the long side is needed at the start and at the end only.

    Source: Jordan et al., 2024 (Muon), with its quintic coefficients; singular values end between about 0.7 and 1.2.
    """
    x = p / (p.square().sum((-2, -1), keepdim=True) + 1e-14).sqrt()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    gram, eye = x @ x.mT, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    total = eye
    for step in range(steps):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        total = factor @ total
        if step < steps - 1:
            gram = factor @ gram @ factor
    x = total @ x
    return x.mT if is_tall else x


def monomials(x: Tensor, degree: int) -> Tensor:
    """x, and with degree 2 all products x_i x_j, i <= j, divided by sqrt(2) where i = j: (..., K + K (K + 1) / 2).

    Example:
        >>> monomials(torch.tensor([2.0, 3.0]), 2).tolist()[:2], monomials(torch.ones(3), 2).shape
        ([2.0, 3.0], torch.Size([9]))
    """
    if degree == 1:
        return x
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    scale = torch.where(first == second, 2**-0.5, 1.0).to(x.dtype)
    return torch.cat((x, x[..., first] * x[..., second] * scale), -1)
