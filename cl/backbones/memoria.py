"""Memoria: Hebbian engrams beside a decoder, outside of back-propagation.

    w = abstractor(what the decoder read of the segment before)             working memory
    reminded = rules(engrams, w)                                            short- and long-term memory
    in each block:  x <- x + attend(norm x -> w) + attend(norm x -> reminded),  with the same weights
    engrams: fire together, wire together; live longer by the attention they got; working -> short -> long term

The rules are those of `cl/backbones/_engrams.py`. With `persist`, the engrams that live longest outlive the batch:
`commit` writes them to buffers after the optimizer step, and every document begins with them as long-term memory.

Shape legend: B rows, T tokens, D width, m working engrams, N places, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones import _engrams
from cl.backbones._block import Auxiliary
from cl.backbones._engrams import EMPTY, LONG, Rules, compact
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._norm import RMSNorm
from cl.backbones._reading import draw
from cl.backbones._segments import CrossAttention, Segment, Segmented, Slots, kept
from cl.backbones._state import State, where_rows
from cl.core import Batch, Output, StreamInfo, UserError


class Memoria(Segmented):
    """Engrams around any decoder.

    Args:
        segment: T, tokens of a segment.
        num_working: m, vectors that a segment is abstracted to.
        num_short, num_long: places of short- and long-term memory.
        remind_short, remind_long: engrams that are reminded at most.
        depth: of the search along co-fire counts.
        life: of a new engram, in segments.
        gain: of life by attention.
        period: segments after which a row forgets everything; None never does.
        persist: engrams that outlive a batch and that every row begins with; 0 keeps none.
        num_heads: of the decoder and of reading.
        decoder: further options of `Gpt`.

    Raises:
        UserError: a value outside its range.

    Cost: 4 D^2 more weights a block and about 10 D^2 for the abstractor; 4 D^2 + 2 (m + R) D more multiply-adds a token
        and block for R reminded; the state holds N D + N^2 numbers.
    Source: Park & Bak, "Memoria: Resolving Fateful Forgetting Problem through Human-Inspired Memory Architecture",
        2023, and the code in cosmoquester/memoria (there m = 50, 400 short-term places, 50 and 50 reminded, depth 10,
        life 9, gain 8, period 500). Differences: long-term memory has a size, and the least living leave it; only what
        is reminded starts a search (there every other short-term engram starts one too, at a place drawn by chance:
        its index of -1 is taken for the last engram's), and gain counts no empty place as reminded; a search stops
        where there is nothing left to reach (there it goes on from the last row); ties are broken by a counter, not by
        torch's global generator; memory is read before a block and not between its halves; `persist` is ours.
    """

    toy = {"segment": 2, "num_working": 2, "num_short": 2, "num_long": 4}
    lifetime = Lifetime(
        fast=("engrams", "read", "seen", "step"), kept=("kept_data", "kept_kind", "kept_life", "kept_count")
    )

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_working: int = 4,
        num_short: int = 32,
        num_long: int = 64,
        remind_short: int = 8,
        remind_long: int = 8,
        depth: int = 10,
        life: float = 9.0,
        gain: float = 8.0,
        period: int | None = 500,
        persist: int = 0,
        num_heads: int = 4,
        **decoder: Any,
    ) -> None:
        counts = {"num_working": num_working, "num_short": num_short, "num_long": num_long}
        for name, value in (counts | {"remind_short": remind_short, "remind_long": remind_long}).items():
            require_width(name, value)
        if period is not None:
            require_width("period", period)
        for name, number, smallest in (("depth", depth, 0), ("persist", persist, 0)):
            if not isinstance(number, int) or isinstance(number, bool) or number < smallest:
                raise UserError(f"backbone.{name} is {number!r}; it must be an integer of at least {smallest}")
        if persist > num_long:
            raise UserError(f"backbone.persist is {persist}; it must be at most backbone.num_long={num_long}")
        if not isinstance(life, int | float) or not life > 1 or not isinstance(gain, int | float) or not gain >= 0:
            raise UserError(f"backbone.life is {life!r} and gain {gain!r}; they must be above 1, and at least 0")
        super().__init__(info, segment, num_heads=num_heads, **decoder)
        width = self.num_features
        self.rules = Rules(num_short, remind_short, remind_long, depth, float(life), float(gain))
        self.num_places, self.period, self.persist = num_short + num_long, period, persist
        self.abstractor = Abstractor(width, num_working)
        self.reads = nn.ModuleList(CrossAttention(width, num_heads, has_norm=False) for _ in self.blocks)
        self.norms = nn.ModuleList(nn.ModuleList(RMSNorm(width, eps=1e-6) for _ in range(2)) for _ in self.blocks)
        draw(nn.ModuleList((self.reads, self.abstractor)), len(self.blocks))
        for name, value in _engrams.empty(1, persist, width, self.norm.weight).items():
            self.register_buffer(f"kept_{name}", value[0].detach().clone())

    def fresh_memory(self, num_rows: int) -> State:
        weight, missing = self.norm.weight, self.num_places - self.persist
        engrams = _engrams.empty(num_rows, missing, weight.shape[0], weight)
        if self.persist:
            shared = {name: torch.stack([getattr(self, f"kept_{name}")] * num_rows) for name in engrams}
            engrams = {name: torch.cat((engrams[name], shared[name]), 1) for name in ("data", "kind", "life")}
            engrams["count"] = F.pad(shared["count"], (missing, 0, missing, 0))
        read = engrams["data"].new_zeros(num_rows, self.segment, weight.shape[0])
        seen = torch.zeros(read.shape[:2], dtype=torch.bool, device=weight.device)
        step = torch.zeros(num_rows, dtype=torch.int64, device=weight.device)
        return {"engrams": engrams, "read": read, "seen": seen, "step": step}

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        total, x_BTD = Auxiliary(), part.x
        is_there_B = memory["seen"].any(1)
        working_BmD = self.abstractor(memory["read"].to(x_BTD.dtype), memory["seen"])
        engrams = self.rules.joined(memory["engrams"], working_BmD.detach(), is_there_B)
        reminded_BN = self.rules.reminded(engrams, memory["step"])
        data_BND = engrams["data"].to(x_BTD.dtype)
        asks = part.continues[:, None, :, None]
        looks, num_asking = torch.zeros_like(engrams["life"]), part.continues.sum(1, keepdim=True)
        for number, (reader, norms) in enumerate(zip(self.reads, self.norms, strict=True)):
            working_norm, norm = norms.children()
            found_BTD, _ = reader(working_norm(x_BTD), working_BmD, asks & is_there_B.view(-1, 1, 1, 1))
            x_BTD = x_BTD + found_BTD
            found_BTD, weight_BHTN = reader(norm(x_BTD), data_BND, asks & reminded_BN[:, None, None])
            x_BTD = x_BTD + found_BTD
            looks = looks + weight_BHTN.detach().mean(1).sum(1) / num_asking
            x_BTD, _ = self.through(number, x_BTD, None, part.own_reset, part.mode, total)
        read_BTD = self.norm(x_BTD)
        if not part.is_whole:
            return read_BTD, memory, total
        aged = self.rules.aged(engrams, reminded_BN, looks / len(self.blocks), self.num_places)
        return read_BTD, self._after(part, memory, aged, kept(read_BTD.detach())), total

    def _after(self, part: Segment, memory: State, engrams: State, read_BTD: Tensor) -> State:
        step_B = memory["step"] + 1
        fresh = self.fresh_memory(len(step_B))
        after: State = {
            "engrams": where_rows(part.is_left, fresh["engrams"], engrams),
            "read": read_BTD,
            "seen": part.is_last,
            "step": torch.where(part.is_left, 0, step_B),
        }
        return after if self.period is None else where_rows(after["step"] >= self.period, fresh, after)

    @property
    def commits(self) -> bool:
        return self.persist > 0

    @torch.no_grad()
    def commit(self, batch: Batch, output: Output) -> None:
        """Keep the engrams with the longest life left, each once however many rows began with it.

        They live on as long as new ones at most, or none of those would ever take a place. Engrams of different rows
        have never fired together.
        """
        engrams = output.state["memory"]["engrams"]
        data, life = engrams["data"].flatten(0, 1), engrams["life"].flatten()
        kind = torch.where(engrams["kind"].flatten() > 0, LONG, EMPTY)
        # copies side by side, the one with the longest life first
        which = torch.unique(data, dim=0, return_inverse=True)[1]
        order = life.argsort(descending=True, stable=True)
        order = order[which[order].argsort(stable=True)]
        kind[order[1:][which[order[1:]] == which[order[:-1]]]] = EMPTY
        own = {
            "data": data.unsqueeze(0),
            "kind": kind.unsqueeze(0),
            "life": life.unsqueeze(0),
            "count": torch.block_diag(*engrams["count"]).unsqueeze(0),
        }
        left = compact(own, self.persist)
        left["life"].clamp_(max=self.rules.life)
        for name, value in left.items():
            getattr(self, f"kept_{name}").copy_(value[0])


class Abstractor(nn.Module):
    """m vectors of a segment: softmax(Q (x W_k)^T) (x W_v), then two linear maps. Source: memoria/abstractor.py."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.slots = Slots(count, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor, seen_BT: Tensor) -> Tensor:
        score_BmT = kept(self.slots(len(x_BTD)).to(x_BTD.dtype) @ self.key(x_BTD).transpose(1, 2))
        # a row that has seen nothing is not asked
        weight_BmT = score_BmT.masked_fill(~seen_BT.unsqueeze(1), torch.finfo(score_BmT.dtype).min).softmax(-1)
        found_BmD = weight_BmT.to(x_BTD.dtype) @ self.value(x_BTD)
        y_BmD: Tensor = self.out(self.up(found_BmD))
        return y_BmD
