"""A short causal convolution over what belongs to the same text, or to the same chunk of it.

Shape legend: B rows, T tokens, P tokens before, J taps, X channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolved(
    x_BTX: Tensor, tail_BPX: Tensor, weight_JX: Tensor, before_BT: Tensor, nearest: int = 0
) -> tuple[Tensor, Tensor]:
    """y_t = sum_j w_j * x_{t - nearest - j} over the tokens that t may see, each channel by itself.

    Args:
        tail_BPX: what came before the first token, P = J - 1 + nearest tokens of whatever document.
        before_BT: how many tokens before itself each token may see.
        nearest: tokens back at which the first tap looks; 1 leaves the token itself out.

    Returns:
        (B, T, X), and the tail after the last token.

    Example:
        >>> x, before = torch.arange(1.0, 5).view(1, 4, 1), torch.tensor([[0, 1, 0, 1]])
        >>> y, tail = convolved(x, torch.zeros(1, 1, 1), torch.tensor([[1.0], [10.0]]), before)
        >>> y.flatten().tolist(), tail.item()
        ([1.0, 12.0, 3.0, 34.0], 4.0)
    """
    num_tokens, num_before = x_BTX.shape[1], tail_BPX.shape[1]
    full_BSX = torch.cat((tail_BPX, x_BTX.to(tail_BPX.dtype)), 1)
    y_BTX = torch.zeros_like(full_BSX[:, :num_tokens])
    for back, weight_X in enumerate(weight_JX, nearest):
        low = num_before - back
        is_seen_BT1 = (before_BT >= back).unsqueeze(2)
        y_BTX = y_BTX + torch.where(is_seen_BT1, weight_X * full_BSX[:, low : low + num_tokens], 0)
    return y_BTX, full_BSX[:, num_tokens:]
