"""A short causal convolution over time within documents, whose unfinished window is part of the state.

Shape legend: B rows, T tokens, C channels, P = size - 1 tokens before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.common.fused import convolved

PIECE = 512
"""Tokens at a time, where the gradient of the weights is summed."""


class ShortConvolution(nn.Module):
    """y_t = silu(sum_j w_j * x_{t-j}) over the last `size` tokens of the document, each channel by itself.

    Args:
        channels: C.
        size: tokens that a token sees, itself among them; 0 leaves the input as it is.

    Cost: C * size multiply-adds a token; the state holds (size - 1) C numbers a row.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.channels, self.size, self.num_before = channels, size, max(0, size - 1)
        if size:
            # the last tap is the token itself
            self.weight = nn.Parameter(torch.empty(channels, size).uniform_(-1, 1) * size**-0.5)

    def forward(self, x_BTC: Tensor, tail_BPC: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            tail_BPC: inputs before, of the document that goes on; zeros where there are none.

        Returns:
            (B, T, C), and the tail after the last token.
        """
        (y_BTC,), after_BPC = self.parts((x_BTC,), tail_BPC, reset_BT)
        return y_BTC, after_BPC

    def parts(
        self, parts_BTX: Sequence[Tensor], tail_BPC: Tensor, reset_BT: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The same of channels that come, and are wanted, in several tensors: they are never joined."""
        if self.size == 0:
            return list(parts_BTX), tail_BPC
        sizes, dtype = [x.shape[-1] for x in parts_BTX], parts_BTX[0].dtype
        tails, weights = tail_BPC.to(dtype).split(sizes, -1), self.weight.to(dtype).split(sizes)
        y = [convolved(*own, reset_BT, _convolved) for own in zip(parts_BTX, tails, weights, strict=True)]
        last_BLC = torch.cat([x[:, max(0, x.shape[1] - self.num_before) :] for x in parts_BTX], -1)
        after_BPC = torch.cat((tail_BPC, last_BLC.to(tail_BPC.dtype)), 1)[:, last_BLC.shape[1] :]
        if reset_BT is not None:
            document_BS = F.pad(reset_BT.long().cumsum(1), (self.num_before, 0))
            is_last = document_BS[:, reset_BT.shape[1] :] == document_BS[:, -1:]
            after_BPC = after_BPC * is_last.unsqueeze(-1)
        return y, after_BPC


def _convolved(x_BTC: Tensor, tail_BPC: Tensor, weight_CJ: Tensor, reset_BT: Tensor | None) -> Tensor:
    """What `kernels.common.fused.convolved` is, in torch."""
    full_BSC = torch.cat((tail_BPC, x_BTC), 1)
    if reset_BT is None:
        return F.silu(_depthwise(full_BSC, weight_CJ))
    document_BT = reset_BT.long().cumsum(1)
    document_BS = F.pad(document_BT, (tail_BPC.shape[1], 0))
    y_BTC = torch.zeros_like(x_BTC)
    for tap, weight_C in enumerate(weight_CJ.unbind(1)):
        seen = slice(tap, tap + x_BTC.shape[1])
        is_own_BT1 = (document_BS[:, seen] == document_BT).unsqueeze(-1)
        y_BTC = y_BTC + weight_C * full_BSC[:, seen] * is_own_BT1
    return F.silu(y_BTC)


def _depthwise(x_BSC: Tensor, weight_CJ: Tensor) -> Tensor:
    """sum_j w_j * x_{t+j} (B, S - J + 1, C)."""
    if x_BSC.device.type == "cpu" and x_BSC.dtype == torch.float32:
        y_BTC: Tensor = _Depthwise.apply(x_BSC, weight_CJ)
        return y_BTC
    return F.conv1d(x_BSC.mT, weight_CJ.unsqueeze(1), groups=len(weight_CJ)).mT


def _as_image(x_BSC: Tensor, weight_CJ: Tensor, padding: int = 0) -> Tensor:
    """`_depthwise` as an image of one line, whose channels lie side by side as they do here: a quarter of the time of
    conv1d in float32; other dtypes have no such kernel on a CPU and would take three times as long."""
    image = x_BSC.mT.unsqueeze(2)
    return F.conv2d(image, weight_CJ[:, None, None], padding=(0, padding), groups=len(weight_CJ)).squeeze(2).mT


class _Depthwise(torch.autograd.Function):
    """`_as_image`, with a backward of its own: torch takes 30 times the forward for the gradient of the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BSC: Tensor, weight_CJ: Tensor) -> Tensor:
        return _as_image(x_BSC, weight_CJ)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_BTC: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BSC, weight_CJ = ctx.saved_tensors
        taps = range(weight_CJ.shape[1])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _as_image(dy_BTC, weight_CJ.flip(1), padding=len(taps) - 1)
        if ctx.needs_input_grad[1]:
            # so few tokens at a time that their products stay in the cache
            parts = [
                torch.stack([(dy_BPC * x_BSC[:, start + tap :][:, : dy_BPC.shape[1]]).sum((0, 1)) for tap in taps], 1)
                for start, dy_BPC in zip(range(0, dy_BTC.shape[1], PIECE), dy_BTC.split(PIECE, 1), strict=True)
            ]
            dweight = torch.stack(parts).sum(0)
        return dx, dweight
