"""The last few tokens of a document at every token, and texts cut where segments begin.

Shape legend: B rows, T tokens, N tokens of a window, X trailing sizes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def windows(x_BTX: Tensor, tail_BPX: Tensor, reset_BT: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """The `size` tokens that end with each one, oldest first, zeros for those of an earlier document.

    Args:
        tail_BPX: what came before, `size` - 1 tokens, zeros where they do not belong to the open document.

    Returns:
        (B, T, N, X), and the tail of the next call.

    Example:
        >>> x, reset = torch.arange(1.0, 5).view(1, 4, 1), torch.tensor([[False, False, True, False]])
        >>> seen, tail = windows(x, torch.zeros(1, 1, 1), reset, 2)
        >>> seen.squeeze().tolist(), tail.item()
        ([[0.0, 1.0], [1.0, 2.0], [0.0, 3.0], [3.0, 4.0]], 4.0)
    """
    num_tokens = x_BTX.shape[1]
    both = torch.cat((tail_BPX.to(x_BTX.dtype), x_BTX), 1)
    seen = both.unfold(1, size, 1).movedim(-1, 2)
    tail = both[:, num_tokens:]
    if reset_BT is not None:
        place_T = torch.arange(num_tokens, device=x_BTX.device)
        # first token of the document that is open at each token; below all where it began before this call
        first_BT = torch.where(reset_BT, place_T, -size).cummax(1).values
        of_window = place_T[:, None] + torch.arange(1 - size, 1, device=x_BTX.device)
        own_BTN = of_window >= first_BT[..., None]
        seen = torch.where(own_BTN.view(*own_BTN.shape, *[1] * (x_BTX.dim() - 2)), seen, 0)
        place_P = torch.arange(num_tokens - size + 1, num_tokens, device=x_BTX.device)
        kept_BP = place_P >= first_BT[:, -1:]
        tail = torch.where(kept_BP.view(*kept_BP.shape, *[1] * (x_BTX.dim() - 2)), tail, 0)
    return seen, tail


def pieces(num_tokens: int, place_B: Tensor, reset: Tensor | None, size: int) -> list[tuple[int, int]]:
    """Runs of tokens in which no row begins a segment of `size` tokens, or a document, but at the first one.

    Args:
        place_B: tokens of each row's open segment that were read before. Reads it, so it waits for the device.

    Example:
        >>> pieces(7, torch.tensor([1, 0]), None, 4)
        [(0, 3), (3, 4), (4, 7)]
    """
    borders = {0, num_tokens}
    for row, place in enumerate(place_B.tolist()):
        starts = [] if reset is None else reset[row].nonzero().flatten().tolist()
        first = -place
        for stop in [*starts, num_tokens]:
            borders.update(range(first, stop, size))
            first = stop
        borders.update(starts)
    ordered = sorted(border for border in borders if 0 <= border <= num_tokens)
    return list(pairwise(ordered))
