"""Chunk layout and decay algebra on torch tensors, shared by every matrix-state op.

Legend: B batch, T time, H heads, N chunks, C chunk length, K/V key/value width, M = N*B*H chunk rows (chunk-major, so
that one step of the loop over chunks is a contiguous slice), G gate width: 1 (one decay per head) or K (per channel).

Every exponent is a sum of log decays over an interval of tokens, computed as such and never as a difference of two
running sums: nothing overflows, nothing cancels, and the gate gradient is the transposed sum.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from functools import cached_property

import torch
from torch import Tensor

from kernels.common.checks import state_dtype


def to_chunks(x_BTHD: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] to [M, C, D] in the arithmetic dtype, padded with zeros: a zero token changes no state."""
    batch, length, heads, width = x_BTHD.shape
    n = -(-length // chunk)
    dtype = state_dtype(x_BTHD.dtype)
    if n * chunk == length:
        whole_BNCHD: Tensor = x_BTHD.to(dtype).unflatten(1, (n, chunk))
        return whole_BNCHD.permute(1, 0, 3, 2, 4).reshape(-1, chunk, width)
    out = x_BTHD.new_zeros(n, batch, heads, chunk, width, dtype=dtype)
    whole = n - 1
    body, tail = x_BTHD[:, : whole * chunk], x_BTHD[:, whole * chunk :]
    if whole:
        out[:whole] = body.unflatten(1, (whole, chunk)).permute(1, 0, 3, 2, 4)
    out[whole, :, :, : tail.shape[1]] = tail.transpose(1, 2)
    return out.view(-1, chunk, width)


def from_chunks(x_MCD: Tensor, batch: int, length: int, heads: int) -> Tensor:
    """Inverse of `to_chunks`, dropping the padding: [B, T, H, D], not contiguous."""
    _, chunk, width = x_MCD.shape
    x_BNCHD = x_MCD.view(-1, batch, heads, chunk, width).permute(1, 0, 3, 2, 4)
    return x_BNCHD.reshape(batch, -1, heads, width)[:, :length]


def triangle(chunk: int, like: Tensor, *, strict: bool = False) -> Tensor:
    """Lower triangle of ones [C, C]."""
    return torch.ones(chunk, chunk, dtype=like.dtype, device=like.device).tril(-1 if strict else 0)


class Decay:
    """Decay factors of every chunk. `into`: chunk start to token; `out`: token to chunk end; `total`: whole chunk."""

    def __init__(self, g_MCG: Tensor):
        self.g = g_MCG
        self.lower = triangle(g_MCG.shape[1], g_MCG)
        self.upper = triangle(g_MCG.shape[1], g_MCG, strict=True).mT
        self.into_MCG = (self.lower @ g_MCG).exp_()
        self.out_MCG = (self.upper @ g_MCG).exp_()
        self.total_MG1 = g_MCG.sum(1).exp_()[..., None]

    def gate(self, x_MCK: Tensor) -> Tensor:
        """Sum a per-channel gradient to the gate's width."""
        return x_MCK.sum(-1, keepdim=True) if self.g.shape[-1] == 1 else x_MCK

    def gate_gradient(self, into_MCK: Tensor, out_MCK: Tensor, total_MKV: Tensor) -> Tensor:
        """Gradient of g from (value * gradient) of everything that carries `into`, `out` and `total`."""
        total = total_MKV.sum(-1)
        if self.g.shape[-1] == 1:
            total = total.sum(-1, keepdim=True)
        return self.lower.mT @ self.gate(into_MCK) + self.upper.mT @ self.gate(out_MCK) + total[:, None]

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        """P[i, j] = sum_c q[i, c] k[j, c] exp(sum of g over (j, i]) for j <= i (j < i when strict), else 0."""
        raise NotImplementedError

    def scores_backward(
        self, q_MCK: Tensor, k_MCK: Tensor, p_MCC: Tensor, dp_MCC: Tensor, *, strict: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and g; `dp` need not be masked."""
        raise NotImplementedError


class ScalarDecay(Decay):
    """One decay per head and token: the scores are masked by one matrix L[i, j]."""

    def __init__(self, g_MCG: Tensor):
        super().__init__(g_MCG)
        # in float64 the difference of running sums is as good as the sum over the interval
        run = g_MCG[..., 0].double().cumsum(1)
        between = (run[:, :, None] - run[:, None, :]).to(g_MCG.dtype)
        self.mask_MCC = between.masked_fill_(self.upper.bool(), -torch.inf).exp_()

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        p = torch.bmm(q_MCK, k_MCK.mT).mul_(self.mask_MCC)
        return p.tril_(-1) if strict else p

    def scores_backward(
        self, q_MCK: Tensor, k_MCK: Tensor, p_MCC: Tensor, dp_MCC: Tensor, *, strict: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # dg_s = sum of p * dp over i >= s > j; the diagonal holds no decay
        through = (p_MCC * dp_MCC).tril_(-1) @ self.upper
        dg = through.mul_(self.lower).sum(1)[..., None]
        inner = dp_MCC * self.mask_MCC
        if strict:
            inner.tril_(-1)
        return torch.bmm(inner, k_MCK), torch.bmm(inner.mT, q_MCK), dg


class ChannelDecay(Decay):
    """One decay per key channel: the triangle is cut into squares, halves of halves, down to single tokens.

    In a square the rows are the second half of a block and the columns the first half, so both factors, from the
    column to the middle and from the middle to the row, are at most 1: no exponent is ever positive.
    """

    @cached_property
    def _levels(self) -> list[tuple[int, Tensor, Tensor]]:
        """Widths 1, 2, 4 .. C/2 with the factors from first halves to the middle and from there to second halves.

        Within blocks of `width`: prefix sums g from the block's start through the token, suffix from behind the token
        to the block's end; both are extended in place for the next level, by additions only. Kept for one section,
        which uses them up to four times.
        """
        prefix, suffix = self.g.clone(), torch.zeros_like(self.g)
        levels, width = [], 1
        while width < self.g.shape[1]:
            levels.append((width, self._half(suffix, width, 0).exp(), self._half(prefix, width, 1).exp()))
            p, s = prefix.unflatten(1, (-1, 2, width)), suffix.unflatten(1, (-1, 2, width))
            s[:, :, 0] += p[:, :, 1, -1:]
            p[:, :, 1] += p[:, :, 0, -1:]
            width *= 2
        return levels

    @staticmethod
    def _half(x_MCK: Tensor, width: int, which: int) -> Tensor:
        """First (0) or second (1) halves of the blocks of 2 * width: [M, blocks, width, K]."""
        view: Tensor = x_MCK.unflatten(1, (-1, 2, width))
        return view[:, :, which]

    @staticmethod
    def _squares(p_MCC: Tensor, width: int) -> Tensor:
        """View of the level's squares [M, width, width, blocks]."""
        blocks = p_MCC.shape[1] // (2 * width)
        view: Tensor = p_MCC.unflatten(2, (blocks, 2 * width)).unflatten(1, (blocks, 2 * width))
        return view.diagonal(dim1=1, dim2=3)[:, width:, :width]

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        chunk = q_MCK.shape[1]
        p = q_MCK.new_zeros(q_MCK.shape[0], chunk, chunk)
        for width, first, second in self._levels:
            q, k = self._half(q_MCK, width, 1) * second, self._half(k_MCK, width, 0) * first
            self._squares(p, width).copy_((q @ k.mT).permute(0, 2, 3, 1))
        if not strict:
            p.diagonal(dim1=1, dim2=2).copy_((q_MCK * k_MCK).sum(-1))
        return p

    def scores_backward(
        self, q_MCK: Tensor, k_MCK: Tensor, p_MCC: Tensor, dp_MCC: Tensor, *, strict: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if strict:
            dq, dk = torch.zeros_like(q_MCK), torch.zeros_like(k_MCK)
        else:
            diagonal = dp_MCC.diagonal(dim1=1, dim2=2)[..., None]
            dq, dk = diagonal * k_MCK, diagonal * q_MCK
        parts = []
        for width, first, second in self._levels:
            q, k = self._half(q_MCK, width, 1) * second, self._half(k_MCK, width, 0) * first
            d = self._squares(dp_MCC, width).permute(0, 3, 1, 2)
            dqs, dks = d @ k, d.mT @ q
            self._half(dq, width, 1).addcmul_(dqs, second)
            self._half(dk, width, 0).addcmul_(dks, first)
            parts.append((width, q.mul_(dqs), k.mul_(dks)))
        # `_levels` transposed, widest first: gradients of prefix and suffix down to single tokens
        dprefix, dsuffix = torch.zeros_like(self.g), torch.zeros_like(self.g)
        for width, x_second, x_first in reversed(parts):
            dp_second, ds_first = self._half(dprefix, width, 1), self._half(dsuffix, width, 0)
            self._half(dprefix, width, 0)[:, :, -1] += dp_second.sum(2)
            dp_second[:, :, -1] += ds_first.sum(2)
            dp_second += x_second
            ds_first += x_first
        return dq, dk, dprefix


def decay_of(g_BTHG: Tensor | None, like_BTHK: Tensor, chunk: int) -> Decay:
    """The decay of a call; no gate at all is a gate of zero."""
    if g_BTHG is None:
        g_BTHG = like_BTHK.new_zeros(*like_BTHK.shape[:3])
    if g_BTHG.dim() == 3:
        return ScalarDecay(to_chunks(g_BTHG[..., None], chunk))
    return ChannelDecay(to_chunks(g_BTHG, chunk))
