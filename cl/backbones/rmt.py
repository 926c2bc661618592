"""Recurrent Memory Transformer: memory tokens before and after each segment; what the last ones become is handed on.

    [. ; read ; memory_s+1] = decoder([memory_s ; segment s ; memory_s])

The front ones are read by every token, the back ones read the whole segment and write.

Shape legend: B rows, T tokens, D width, m memory tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.backbones._block import Auxiliary
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._segments import Segment, Segmented, Slots, kept
from cl.backbones._state import State
from cl.core import StreamInfo


class Rmt(Segmented):
    """Memory tokens around any decoder.

    Args:
        segment: T, tokens of a segment.
        num_memory: m.
        truncate: k, segments after which the memory is detached; None never does.
        is_replayed: keep memories at the borders only, and read segments again in the backward pass.
        decoder: options of `Gpt`.

    Cost: that of the decoder times 1 + 2 m / T; m D more weights.
    Source: Bulatov, Kuratov & Burtsev, "Recurrent Memory Transformer", 2022, and the code in
        booydar/recurrent-memory-transformer. Differences: truncation is real: there, the detached memory is bound to a
        local name and never used. Memory is read after the last norm, as there with GPT-2.
    """

    toy = {"segment": 4, "num_memory": 2}
    lifetime = Lifetime(fast=("tokens",))

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_memory: int = 4,
        truncate: int | None = None,
        is_replayed: bool = False,
        **decoder: Any,
    ) -> None:
        require_width("num_memory", num_memory)
        super().__init__(info, segment, truncate, is_replayed, **decoder)
        self.slots = Slots(num_memory, self.num_features)

    def fresh_memory(self, num_rows: int) -> State:
        return {"tokens": self.slots(num_rows)}

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        front_BmD, count = memory["tokens"], self.slots.weight.shape[0]
        parts = [front_BmD.to(part.x.dtype), part.x]
        if part.is_whole:
            # what is written must not know the document that has ended
            fresh_BmD = self.slots(len(front_BmD))
            parts.append(torch.where(part.is_left.view(-1, 1, 1), fresh_BmD, front_BmD).to(part.x.dtype))
        reset = part.around(count, count if part.is_whole else 0)
        read_BND, _, auxiliary = self.read(torch.cat(parts, 1), reset=reset, mode=part.mode)
        stop = count + part.x.shape[1]
        after = {"tokens": kept(read_BND[:, stop:])} if part.is_whole else memory
        return read_BND[:, count:stop], after, auxiliary
