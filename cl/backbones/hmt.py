"""Hierarchical Memory Transformer: the last tokens, one summary of the segment, and a queue of earlier summaries.

    q      = decoder([topic ; first half of the segment ; topic]) at its end
    m_in   = softmax(q W_q (M W_k)^T / sqrt(D)) M        long-term: what the queue M answers to what the half is about
    [.. ; m_out] = decoder([sensory ; first half ; m_in ; second half ; m_in])
    M      <- M, m_out                                   the oldest leaves when there are more than L

sensory are the last tokens of the segment before.

Shape legend: B rows, T tokens, D width, L summaries of the queue.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._block import Auxiliary, add_terms
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._reading import draw
from cl.backbones._segments import Segment, Segmented, Slots, kept
from cl.backbones._state import State
from cl.core import StreamInfo, UserError


class Hmt(Segmented):
    """Sensory, short-term and long-term memory around any decoder.

    Args:
        segment: T, tokens of a segment.
        num_sensory: tokens of the segment before that are read again.
        num_long: L.
        truncate: k, segments after which the memory is detached; None never does.
        is_replayed: keep memories at the borders only, and read segments again in the backward pass.
        decoder: options of `Gpt`.

    Raises:
        UserError: a value outside its range.

    Cost: that of the decoder times about 1.5 + num_sensory / T: half of each segment is read twice; 2 D^2 + 2 D more
        weights; the state holds L D numbers.
    Source: He et al., "HMT: Hierarchical Memory Transformer for Long Context Language Processing", 2024, and the code
        in OswaldHe/HMT-pytorch. Differences: what is recalled stands behind the half that asked for it: in the paper it
        stands in front of it, which shows a token what comes after it. Sensory tokens stand in front of everything.
        Truncation is real (the published code binds the detached memory to a name that is never used).
    """

    toy = {"segment": 2, "num_sensory": 1, "num_long": 2}
    lifetime = Lifetime(fast=("sensory", "long", "count"))

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_sensory: int = 8,
        num_long: int = 100,
        truncate: int | None = None,
        is_replayed: bool = False,
        **decoder: Any,
    ) -> None:
        for name, value in (("num_sensory", num_sensory), ("num_long", num_long)):
            require_width(name, value)
        require_width("segment", segment)
        if segment < 2 or num_sensory > segment:
            raise UserError(
                f"backbone.segment is {segment} with backbone.num_sensory={num_sensory}; it must be at least 2, and "
                "hold the sensory tokens"
            )
        super().__init__(info, segment, truncate, is_replayed, **decoder)
        self.num_sensory, self.num_long, self.num_asking = num_sensory, num_long, segment // 2
        self.topic, self.blank = Slots(1, self.num_features), Slots(1, self.num_features)
        self.query = nn.Linear(self.num_features, self.num_features, bias=False)
        self.key = nn.Linear(self.num_features, self.num_features, bias=False)
        draw(nn.ModuleList((self.query, self.key)), 1)

    def fresh_memory(self, num_rows: int) -> State:
        weight = self.topic.weight
        dtype = torch.promote_types(torch.float32, weight.dtype)
        number = torch.zeros(num_rows, dtype=torch.int64, device=weight.device)
        shape = (num_rows, self.num_sensory)
        sensory = (
            number.new_zeros(shape)
            if self.is_text
            else weight.new_zeros((*shape, self.embedding.in_features), dtype=dtype)
        )
        long = weight.new_zeros((num_rows, self.num_long, weight.shape[1]), dtype=dtype)
        return {"sensory": sensory, "long": long, "count": number}

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        total, x_BTD, half = Auxiliary(), part.x, self.num_asking
        num_tokens, start = x_BTD.shape[1], self.num_sensory
        sensory_BSD, sensory_BS = self._sensory(memory)
        own_BT = part.reset.clone()
        # whether anything before the segment may be seen
        own_BT[:, 0] = memory["count"] == 0
        pieces, flags = [sensory_BSD, x_BTD[:, :half]], [sensory_BS, own_BT[:, :half]]
        no_B1 = torch.zeros_like(own_BT[:, :1])
        if num_tokens > half:
            recalled_B1D = self._recalled(part, memory, total)
            pieces += [recalled_B1D.to(x_BTD.dtype), x_BTD[:, half:]]
            flags += [no_B1, own_BT[:, half:]]
        if part.is_whole:
            # what is written must not know the document that has ended
            ended_B11 = part.reset[:, half:].any(1).view(-1, 1, 1)
            pieces.append(torch.where(ended_B11, self.blank(len(x_BTD)), recalled_B1D).to(x_BTD.dtype))
            flags.append(no_B1)
        read_BND, _, terms = self.read(torch.cat(pieces, 1), reset=torch.cat(flags, 1), mode=part.mode)
        add_terms(total, terms)
        after = self._after(part, memory, kept(read_BND[:, -1:])) if part.is_whole else memory
        halves = [read_BND[:, start : start + half], read_BND[:, start + half + 1 :]]
        return torch.cat(halves, 1)[:, :num_tokens], after, total

    def _sensory(self, memory: State) -> tuple[Tensor, Tensor]:
        """The last tokens of the segment before, embedded, and where documents start among them."""
        raw = memory["sensory"]
        found = self.resets(raw)
        reset_BS = torch.zeros(raw.shape[:2], dtype=torch.bool, device=raw.device) if found is None else found.clone()
        reset_BS[:, 0] = False
        return self.embed(raw), reset_BS

    def _recalled(self, part: Segment, memory: State, total: Auxiliary) -> Tensor:
        """(B, 1, D) what the queue answers; the learned blank where it holds nothing of the document."""
        long_BLD, half_BT = memory["long"], part.reset[:, : self.num_asking]
        count_B = torch.where(half_BT.any(1), 0, memory["count"])
        topic_B1D = self.topic(len(long_BLD)).to(part.x.dtype)
        asking_BND = torch.cat((topic_B1D, part.x[:, : self.num_asking], topic_B1D), 1)
        read_BND, _, terms = self.read(asking_BND, reset=nn.functional.pad(half_BT, (1, 1)), mode=part.mode)
        add_terms(total, terms)
        q_B1D, k_BLD = self.query(read_BND[:, -1:]), self.key(long_BLD.to(read_BND.dtype))
        score_B1L = kept(q_B1D @ k_BLD.transpose(1, 2)) / long_BLD.shape[2] ** 0.5
        place_L = torch.arange(self.num_long, device=count_B.device)
        is_filled_B1L = (place_L >= self.num_long - count_B.unsqueeze(1)).unsqueeze(1)
        weight_B1L = score_B1L.masked_fill(~is_filled_B1L, torch.finfo(score_B1L.dtype).min).softmax(-1)
        return torch.where((count_B > 0).view(-1, 1, 1), weight_B1L @ long_BLD, self.blank(len(long_BLD)))

    def _after(self, part: Segment, memory: State, summary_B1D: Tensor) -> State:
        count_B = torch.where(part.is_left, 0, memory["count"])
        return {
            "sensory": part.raw[:, -self.num_sensory :],
            "long": torch.cat((memory["long"][:, 1:], summary_B1D), 1),
            "count": (count_B + 1).clamp(max=self.num_long),
        }
