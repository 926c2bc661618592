"""Decay algebra of a chunk with one decay per key channel.

Legend: as in kernels.common.chunks.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from functools import cached_property

import torch
from torch import Tensor

from kernels.common.decay import Decay, triangle

# a sum of log decays up to which e^x and e^-x may stand apart: what they lose is one rounding of x
APART = 8.0


class ChannelDecay(Decay):
    """One decay per key channel: the triangle is cut into blocks on its diagonal and squares of halves below them.

    In a square the rows are the second half of a block and the columns the first half, so both factors, from the
    column to the middle and from the middle to the row, are at most 1: no exponent is ever positive. In the blocks on
    the diagonal they are e^x and e^-x around the middle, so the blocks are as wide as the decays allow: with mild ones
    a whole chunk, with the hardest single tokens.
    """

    def __init__(self, g_MCK: Tensor):
        self.g = g_MCK
        self.lower = triangle(g_MCK.shape[1], g_MCK)
        self.upper = triangle(g_MCK.shape[1], g_MCK, strict=True).mT
        sums = (self.lower @ g_MCK, self.upper @ g_MCK, g_MCK.sum(1)[..., None])
        super().__init__(*(x.exp_() for x in sums))
        self.block, halves = 1, g_MCK
        while 2 * self.block <= g_MCK.shape[1] and float(halves.abs().amax()) <= APART:
            self.block *= 2
            halves = halves[:, 0::2] + halves[:, 1::2]

    def gate_gradient(self, into_MCK: Tensor, out_MCK: Tensor, states_MKV: Tensor, dstates_MKV: Tensor) -> Tensor:
        total = dstates_MKV.mul_(states_MKV).sum(-1).mul_(self.total_MG1[..., 0])
        return self.lower.mT @ into_MCK + self.upper.mT @ out_MCK + total[:, None]

    def _in_blocks(self, x_MCD: Tensor) -> Tensor:
        """[M * blocks, width of a block, D]."""
        return x_MCD.reshape(-1, self.block, x_MCD.shape[2])

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Within every block: sum of g from its start through the token, and from behind the token to its end."""
        width = self.block
        g = self._in_blocks(self.g)
        inclusive, behind = self.lower[:width, :width] @ g, self.upper[:width, :width] @ g
        return inclusive.view_as(self.g), behind.view_as(self.g)

    @cached_property
    def _apart(self) -> tuple[Tensor, Tensor]:
        """Factors of rows and columns of the blocks on the diagonal: e^x and e^-x, x the sum from the middle on."""
        inclusive = self._in_blocks(self._sums[0])
        x_MCK = (inclusive - inclusive[:, self.block // 2 - 1, None]).view_as(self.g)
        return x_MCK.exp(), x_MCK.neg().exp_()

    @cached_property
    def _levels(self) -> list[tuple[int, Tensor, Tensor]]:
        """Widths from the block to C/2, with the factors from first halves to the middle and from there to second ones.

        The sums are extended in place for the next level, by additions only. Kept for one section, which uses them up
        to four times.
        """
        if self.block == self.g.shape[1]:
            return []
        prefix, suffix = (x.clone() for x in self._sums)
        levels, width = [], self.block
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

    def _diagonal(self, p_MCC: Tensor) -> Tensor:
        """View of the blocks on the diagonal [M, width, width, blocks]."""
        view: Tensor = p_MCC.unflatten(2, (-1, self.block)).unflatten(1, (-1, self.block))
        return view.diagonal(dim1=1, dim2=3)

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        rows, chunk, width = q_MCK.shape[0], q_MCK.shape[1], self.block
        if width == 1:
            blocks = torch.zeros_like(q_MCK[..., :1]) if strict else (q_MCK * k_MCK).sum(-1, keepdim=True)
        else:
            row, column = self._apart
            products = torch.bmm(self._in_blocks(q_MCK * row), self._in_blocks(k_MCK * column).mT)
            blocks = products.tril_(-1 if strict else 0)
        if width == chunk:
            return blocks
        p = q_MCK.new_zeros(rows, chunk, chunk)
        self._diagonal(p).copy_(blocks.view(rows, -1, width, width).permute(0, 2, 3, 1))
        for half, first, second in self._levels:
            q, k = self._half(q_MCK, half, 1) * second, self._half(k_MCK, half, 0) * first
            self._squares(p, half).copy_((q @ k.mT).permute(0, 2, 3, 1))
        return p

    def scores_backward(
        self, q_MCK: Tensor, k_MCK: Tensor, p_MCC: Tensor, dp_MCC: Tensor, kk_MCC: Tensor | None, dkk_MCC: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        diagonal = dp_MCC.diagonal(dim1=1, dim2=2)[..., None]
        dq, dk = diagonal * k_MCK, diagonal * q_MCK
        dg = self._below(q_MCK, k_MCK, dp_MCC, dq, dk)
        if dkk_MCC is not None:
            dg += self._below(k_MCK, k_MCK, dkk_MCC, dk, dk)
        return dq, dk, dg

    def _below(self, q_MCK: Tensor, k_MCK: Tensor, dp_MCC: Tensor, dq_MCK: Tensor, dk_MCK: Tensor) -> Tensor:
        """Add the gradients of q and k through all below the diagonal, which carries no decay; returns that of g."""
        parts = []
        for width, first, second in self._levels:
            q, k = self._half(q_MCK, width, 1) * second, self._half(k_MCK, width, 0) * first
            d = self._squares(dp_MCC, width).permute(0, 3, 1, 2)
            dqs, dks = d @ k, d.mT @ q
            self._half(dq_MCK, width, 1).addcmul_(dqs, second)
            self._half(dk_MCK, width, 0).addcmul_(dks, first)
            parts.append((width, q.mul_(dqs), k.mul_(dks)))
        # `_levels` transposed, widest first: gradients of prefix and suffix down to single blocks
        dprefix, dsuffix = torch.zeros_like(self.g), torch.zeros_like(self.g)
        for width, x_second, x_first in reversed(parts):
            dp_second, ds_first = self._half(dprefix, width, 1), self._half(dsuffix, width, 0)
            self._half(dprefix, width, 0)[:, :, -1] += dp_second.sum(2)
            dp_second[:, :, -1] += ds_first.sum(2)
            dp_second += x_second
            ds_first += x_first
        if self.block == 1:
            return dprefix
        return self._blocks_below(q_MCK, k_MCK, dp_MCC, dq_MCK, dk_MCK, dprefix, dsuffix)

    def _blocks_below(
        self,
        q_MCK: Tensor,
        k_MCK: Tensor,
        dp_MCC: Tensor,
        dq_MCK: Tensor,
        dk_MCK: Tensor,
        dprefix_MCK: Tensor,
        dsuffix_MCK: Tensor,
    ) -> Tensor:
        """The same for the blocks on the diagonal, and the gradient of g from that of the sums within them."""
        width = self.block
        row, column = self._apart
        q, k = q_MCK * row, k_MCK * column
        if width == dp_MCC.shape[1]:
            d = dp_MCC.tril(-1)
        else:
            d = self._diagonal(dp_MCC).permute(0, 3, 1, 2).reshape(-1, width, width).tril_(-1)
        dqs, dks = torch.bmm(d, self._in_blocks(k)).view_as(q), torch.bmm(d.mT, self._in_blocks(q)).view_as(k)
        dq_MCK.addcmul_(dqs, row)
        dk_MCK.addcmul_(dks, column)
        dprefix_MCK.add_(q.mul_(dqs)).sub_(k.mul_(dks))
        dg = self.lower[:width, :width].mT @ self._in_blocks(dprefix_MCK)
        if self._levels:
            dg += self.upper[:width, :width].mT @ self._in_blocks(dsuffix_MCK)
        return dg.view_as(self.g)
