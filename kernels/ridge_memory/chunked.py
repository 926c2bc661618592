"""The solves of ridge memory in chunks, on any device: Chebyshev iteration of all tokens of a chunk at once.

H_t x of a token is never formed as a matrix: with H the state at the chunk's start,
H_t x = into_t H x + sum over i <= t of (decay of (i, t]) beta_i <k_i, x> k_i, two products per step for a whole chunk.

Legend: as in kernels.common.chunks and kernels.common.sections.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.common import sections
from kernels.common.chunks import decay_of, from_chunks, to_chunks
from kernels.common.decay import ScalarDecay
from kernels.gated_linear_attention import chunked as attention
from kernels.linear_scan import chunked as scan

__all__ = ["attention", "scan", "solve"]


def _solve_section(
    tokens: sections.Tokens, states_MKK: Tensor, *, ratio: float, floor: float, steps: int, chunk: int
) -> Tensor:
    rhs, k, beta, g, norm = tokens
    assert rhs is not None
    assert k is not None
    assert norm is not None
    decay = decay_of(g, k, chunk)
    assert isinstance(decay, ScalarDecay)
    kc, size = to_chunks(k, chunk), to_chunks(norm[..., None], chunk)
    strength = ratio * size + floor
    # the spectrum of H + strength lies in [strength, strength + |H|]; every row is divided by the middle of that
    step = (strength + size / 2).reciprocal_()
    squeeze = (size * step / 2).square_()
    inner, into = decay.mask_MCC * -step, decay.into_MCG * -step
    if beta is not None:
        inner.mul_(to_chunks(beta[..., None], chunk).mT)
    keep = 1 - strength * step
    start = to_chunks(rhs, chunk).mul(step)
    x, before, omega = start.clone(), torch.zeros_like(start), torch.full_like(step, 2.0)
    for _ in range(steps - 1):
        omega = 4 / (4 - squeeze * omega)
        ahead = torch.bmm(x, states_MKK).mul_(into)
        ahead.baddbmm_(torch.bmm(x, kc.mT).mul_(inner), kc).addcmul_(x, keep).add_(start)
        x, before = before.lerp_(ahead, omega), x
    return from_chunks(x, *rhs.shape[:3])


def solve(
    rhs: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    norm: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    fast: bool,
) -> Tensor:
    """(H_t + (ratio |H_t| + floor) I)^-1 rhs_t for every token [B, T, H, K], given |H_t| and the kept chunk states.

    `fast` is for the Triton kernel: here products are always in full precision.
    """
    section = partial(_solve_section, ratio=ratio, floor=floor, steps=steps, chunk=chunk)
    return sections.read(section, [rhs, k, beta, g, norm], rhs, states, cu_seqlens, chunk)
