"""Chunk layout and decay algebra on torch tensors, shared by every matrix-state op.

Legend: B batch, T time, H heads, N chunks, C chunk length, K/V key/value width, M = N*B*H chunk rows (chunk-major, so
that one step of the loop over chunks is a contiguous slice), G gate width: 1 (one decay per head) or K (per channel).

Every exponent is a sum of log decays over an interval of tokens, computed as such and never as a difference of two
running sums: nothing overflows, nothing cancels, and the gate gradient is the transposed sum.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

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

    def _halves(self, width: int) -> tuple[Tensor, Tensor]:
        """Factors of one level: first halves to the middle, middle to second halves; each [M, blocks, width, K]."""
        g = self.g.unflatten(1, (-1, 2, width))
        lower, upper = self.lower[:width, :width], self.upper[:width, :width]
        return (upper @ g[:, :, 0]).exp_(), (lower @ g[:, :, 1]).exp_()

    @staticmethod
    def _squares(p_MCC: Tensor, width: int) -> Tensor:
        """View of the level's squares [M, width, width, blocks]."""
        blocks = p_MCC.shape[1] // (2 * width)
        view: Tensor = p_MCC.unflatten(2, (blocks, 2 * width)).unflatten(1, (blocks, 2 * width))
        return view.diagonal(dim1=1, dim2=3)[:, width:, :width]

    def _levels(self) -> list[int]:
        return [1 << i for i in range(self.g.shape[1].bit_length() - 1)]

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        chunk = q_MCK.shape[1]
        p = q_MCK.new_zeros(q_MCK.shape[0], chunk, chunk)
        for width in self._levels():
            first, second = self._halves(width)
            q, k = q_MCK.unflatten(1, (-1, 2, width))[:, :, 1], k_MCK.unflatten(1, (-1, 2, width))[:, :, 0]
            self._squares(p, width).copy_(((q * second) @ (k * first).mT).permute(0, 2, 3, 1))
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
        dg = torch.zeros_like(self.g)
        for width in self._levels():
            first, second = self._halves(width)
            q, k = (
                q_MCK.unflatten(1, (-1, 2, width))[:, :, 1] * second,
                k_MCK.unflatten(1, (-1, 2, width))[:, :, 0] * first,
            )
            d = self._squares(dp_MCC, width).permute(0, 3, 1, 2)
            dqs, dks = d @ k, d.mT @ q
            half = dg.unflatten(1, (-1, 2, width))
            half[:, :, 0] += self.upper[:width, :width].mT @ (k * dks)
            half[:, :, 1] += self.lower[:width, :width].mT @ (q * dqs)
            dq.unflatten(1, (-1, 2, width))[:, :, 1] += dqs.mul_(second)
            dk.unflatten(1, (-1, 2, width))[:, :, 0] += dks.mul_(first)
        return dq, dk, dg


def decay_of(g_BTHG: Tensor | None, like_BTHK: Tensor, chunk: int) -> Decay:
    """The decay of a call; no gate at all is a gate of zero."""
    if g_BTHG is None:
        g_BTHG = like_BTHK.new_zeros(*like_BTHK.shape[:3])
    if g_BTHG.dim() == 3:
        return ScalarDecay(to_chunks(g_BTHG[..., None], chunk))
    return ChannelDecay(to_chunks(g_BTHG, chunk))
