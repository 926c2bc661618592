"""What a step of TRC2 leaves to be written: which rows, how surprising each token was, and the best of them.

Shape legend: B rows, T tokens, D width, C chunks of a row, K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.backbones.trc2_parts.hippocampus import Reading
from cl.core import IGNORED, Batch, Source, UserError

WRITES_PER_ROW = 4


class Trace(NamedTuple):
    """What a forward leaves for `commit`.

    Args:
        hidden: (B, T, D) normalised states after the early columns.
        surprise: (B, T) of each token, not normalised; 0 where nothing follows it in its document.
        has_next: (B, T) whether the next token belongs to the same document.
        reading: of the store.
    """

    hidden: Tensor
    surprise: Tensor
    has_next: Tensor
    reading: Reading


def is_current(batch: Batch) -> Tensor:
    """(B,) rows that the stream delivered."""
    sources = [part.source == Source.CURRENT for part in batch.parts]
    lengths = torch.tensor([len(part) for part in batch.parts])
    return torch.tensor(sources).repeat_interleave(lengths).to(batch.inputs.device)


def token_losses(logits: Tensor, targets: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """(B, T) cross-entropy of what each token predicts, and where there is one; rows that are no text predict last."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    if targets.dim() == 1:
        loss_BT = F.pad(loss.unsqueeze(1), (num_tokens - 1, 0))
        return loss_BT, torch.ones_like(loss_BT, dtype=torch.bool)
    return loss, targets != IGNORED


def candidates(surprise_BT: Tensor, chunk: int, num_writes: int, min_surprise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, tokens and surprise of what may be stored, the most surprising first.

    Args:
        chunk: tokens that give at most one candidate; a row gives four at most.
        num_writes: most of all rows together.
        min_surprise: what a candidate must exceed.

    Raises:
        UserError: the chunk does not divide the row.
    """
    num_tokens = surprise_BT.shape[1]
    if num_tokens % chunk:
        raise UserError(f"backbone.chunk is {chunk}; it must divide the {num_tokens} tokens of a row")
    best_BC, where_BC = surprise_BT.unflatten(1, (-1, chunk)).max(2)
    token_BC = where_BC + torch.arange(0, num_tokens, chunk, device=where_BC.device)
    best_BK, chunk_BK = best_BC.topk(min(WRITES_PER_ROW, best_BC.shape[1]), 1)
    best, which = best_BK.flatten().topk(min(num_writes, best_BK.numel()))
    which = which[best > min_surprise]
    row_K = which // best_BK.shape[1]
    return row_K, token_BC.gather(1, chunk_BK).flatten()[which], best[: len(which)]
