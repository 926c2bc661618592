"""Memformer: slots that every block reads and that the whole segment writes; training stores the slots only.

    before each block:  x <- x + W_o attend(norm x -> M)
    once a segment:     w_i = attend(M_i -> [M_i ; x_1 .. x_T]);   M_i <- (M_i + w_i) / |M_i + w_i|

A slot sees itself and the tokens, not the other slots; the norm lets what is not written again fade. Memory-replay
back-propagation keeps the slots at the borders and reads each segment again, from the last to the first.

Shape legend: B rows, T tokens, D width, m slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._block import Auxiliary
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._reading import draw
from cl.backbones._segments import CrossAttention, Segment, Segmented, Slots, kept
from cl.backbones._state import State
from cl.core import StreamInfo


class Memformer(Segmented):
    """Memory slots around any decoder.

    Args:
        segment: T, tokens of a segment.
        num_memory: m.
        num_heads: of the decoder, and of reading and writing.
        truncate: k, segments after which the memory is detached; None never does.
        is_replayed: memory-replay back-propagation; gradients are those without it.
        decoder: further options of `Gpt`.

    Cost: 4 D^2 more weights a block and 4 D^2 to write; 2 D^2 + 2 m D more multiply-adds a token and block; training
        holds m D numbers a segment and one segment's activations, and reads every segment twice.
    Source: Wu et al., "Memformer: A Memory-Augmented Transformer for Sequence Modeling", 2020 [recalled], in the spirit
        of: slot attention, forgetting by normalisation, memory-replay back-propagation. Differences: a decoder in
        place of an encoder and a decoder; no learned bias is added before the norm.
    """

    toy = {"segment": 4, "num_memory": 2}
    lifetime = Lifetime(fast=("slots",))

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_memory: int = 8,
        num_heads: int = 4,
        truncate: int | None = None,
        is_replayed: bool = True,
        **decoder: Any,
    ) -> None:
        require_width("num_memory", num_memory)
        super().__init__(info, segment, truncate, is_replayed, num_heads=num_heads, **decoder)
        width = self.num_features
        self.slots = Slots(num_memory, width, 1.0)
        self.reads = nn.ModuleList(CrossAttention(width, num_heads) for _ in self.blocks)
        self.write = CrossAttention(width, num_heads)
        draw(nn.ModuleList((self.reads, self.write)), len(self.blocks))

    def fresh_memory(self, num_rows: int) -> State:
        return {"slots": F.normalize(self.slots(num_rows), dim=-1)}

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        total, x_BTD = Auxiliary(), part.x
        slots_BmD = memory["slots"].to(x_BTD.dtype)
        for number, reader in enumerate(self.reads):
            seen_BTD = reader(x_BTD, slots_BmD)[0]
            x_BTD = x_BTD + (seen_BTD * part.continues.unsqueeze(2) if part.has_resets else seen_BTD)
            x_BTD, _ = self.through(number, x_BTD, None, part.own_reset, part.mode, total)
        read_BTD = self.norm(x_BTD)
        return read_BTD, self._written(part, memory, read_BTD) if part.is_whole else memory, total

    def _written(self, part: Segment, memory: State, read_BTD: Tensor) -> State:
        fresh_BmD = self.fresh_memory(len(read_BTD))["slots"]
        slots_BmD = torch.where(part.is_left.view(-1, 1, 1), fresh_BmD, memory["slots"])
        asking_BmD = slots_BmD.to(read_BTD.dtype)
        count = slots_BmD.shape[1]
        itself_Bmm = torch.eye(count, dtype=torch.bool, device=read_BTD.device).expand(len(read_BTD), -1, -1)
        seen_BmT = part.is_last.unsqueeze(1).expand(-1, count, -1)
        may_look = torch.cat((itself_Bmm, seen_BmT), 2).unsqueeze(1)
        change_BmD, _ = self.write(asking_BmD, torch.cat((asking_BmD, read_BTD), 1), may_look)
        return {"slots": F.normalize(slots_BmD + kept(change_BmD), dim=-1)}
