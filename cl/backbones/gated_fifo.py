"""Chunked attention with a gated queue: blocks look among all tokens, in the segment, and in a queue of its states.

    before each block:  x <- x + W_c attend(norm x -> x of the segment, up to itself) + W_m attend(norm x -> queue)
    the block itself:   attention to all tokens so far, whose state is carried over the borders
    once a segment:     c = tanh(W_c s), s the state of its last token;  g = sigmoid(W_g [newest ; s])
                        push g newest + (1 - g) c;  the oldest leaves when there are more than m

Shape legend: B rows, T tokens, D width, m states of the queue.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._block import Auxiliary
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._reading import draw
from cl.backbones._segments import CrossAttention, Segment, Segmented, kept
from cl.backbones._state import State
from cl.backbones.gpt import Gpt
from cl.core import StreamInfo


class GatedFifo(Segmented):
    """Three attentions summed: to everything, to the segment, and to a gated queue of segment states.

    Args:
        segment: T, tokens of a segment.
        num_memory: m.
        num_heads: of the decoder, and of the attentions beside it.
        truncate: k, segments after which the memory is detached; None never does.
        is_replayed: keep memories at the borders only, and read segments again in the backward pass.
        decoder: further options of `Gpt`; its attention is the global one, and may be any other mixer.

    Cost: 8 D^2 more weights a block and 3 D^2 to write; 6 D^2 + 2 (T + m) D more multiply-adds a token and block; the
        state holds m D numbers beside that of the decoder.
    Source: Kashyap, "Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language
        Modeling", 2025 [paper abstract], whose equations are incomplete: which states are pushed, and where the three
        are added, is our own design. Differences: the queue is not detached unless `truncate` says so, since its gate
        could not be learnt otherwise.
    """

    toy = {"segment": 2, "num_memory": 2}
    lifetime = Lifetime(fast=("queue", "count", "decoder"), resets=("queue", "count"))

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_memory: int = 8,
        num_heads: int = 4,
        truncate: int | None = None,
        is_replayed: bool = False,
        **decoder: Any,
    ) -> None:
        require_width("num_memory", num_memory)
        super().__init__(info, segment, truncate, is_replayed, num_heads=num_heads, **decoder)
        self.num_memory, width = num_memory, self.num_features
        self.local = nn.ModuleList(CrossAttention(width, num_heads) for _ in self.blocks)
        self.queue = nn.ModuleList(CrossAttention(width, num_heads) for _ in self.blocks)
        self.candidate, self.gate = nn.Linear(width, width), nn.Linear(2 * width, width)
        draw(nn.ModuleList((self.local, self.queue, self.candidate, self.gate)), len(self.blocks))

    def fresh_memory(self, num_rows: int) -> State:
        weight = self.candidate.weight
        dtype = torch.promote_types(torch.float32, weight.dtype)
        return {
            "queue": weight.new_zeros((num_rows, self.num_memory, weight.shape[0]), dtype=dtype),
            "count": torch.zeros(num_rows, dtype=torch.int64, device=weight.device),
            "decoder": Gpt.init_state(self, num_rows),
        }

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        total, x_BTD = Auxiliary(), part.x
        after: State = memory | {"decoder": {}}
        queue_BmD = memory["queue"].to(x_BTD.dtype)
        place_m = torch.arange(self.num_memory, device=x_BTD.device)
        is_filled_Bm = place_m >= self.num_memory - memory["count"].unsqueeze(1)
        may_ask = part.continues[:, None, :, None] & is_filled_Bm[:, None, None]
        document_BT, token_T = part.reset.cumsum(1), torch.arange(x_BTD.shape[1], device=x_BTD.device)
        own_BTT = (document_BT.unsqueeze(2) == document_BT.unsqueeze(1)) & (token_T.unsqueeze(1) >= token_T)
        for number, (local, queue) in enumerate(zip(self.local, self.queue, strict=True)):
            found_BTD = local(x_BTD, local.norm(x_BTD), own_BTT.unsqueeze(1))[0]
            x_BTD = x_BTD + found_BTD + queue(x_BTD, queue_BmD, may_ask)[0]
            before, reset = memory["decoder"][str(number)], part.carried_reset
            x_BTD, after["decoder"][str(number)] = self.through(number, x_BTD, before, reset, part.mode, total)
        read_BTD = self.norm(x_BTD)
        return read_BTD, self._pushed(part, after, read_BTD[:, -1]) if part.is_whole else after, total

    def _pushed(self, part: Segment, memory: State, last_BD: Tensor) -> State:
        """The queue with one state more; a document that begins inside the segment has none before."""
        keeps_B1 = ~part.is_left.unsqueeze(1)
        newest_BD = memory["queue"][:, -1] * keeps_B1
        gate_BD = kept(self.gate(torch.cat((newest_BD.to(last_BD.dtype), last_BD), 1))).sigmoid()
        pushed_BD = gate_BD * newest_BD + (1 - gate_BD) * kept(self.candidate(last_BD)).tanh()
        count_B = torch.where(part.is_left, 0, memory["count"])
        return {
            "queue": torch.cat((memory["queue"][:, 1:], pushed_BD.unsqueeze(1)), 1),
            "count": (count_B + 1).clamp(max=self.num_memory),
            "decoder": memory["decoder"],
        }
