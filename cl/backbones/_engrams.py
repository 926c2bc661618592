"""Engrams: vectors that fire together, wire together, live while they are needed, and die when they are not.

All rules work on a row by itself and without gradients. A row holds N places; an empty one has kind 0.

Shape legend: B rows, N places, m working engrams, R reminded places, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl.backbones._state import State

EMPTY, WORKING, SHORT, LONG = range(4)


def empty(num_rows: int, num_places: int, width: int, like: Tensor) -> State:
    """No engram in any place."""
    shape = (num_rows, num_places)
    dtype = torch.promote_types(torch.float32, like.dtype)
    return {
        "data": torch.zeros((*shape, width), dtype=dtype, device=like.device),
        "kind": torch.zeros(shape, dtype=torch.int64, device=like.device),
        "life": torch.zeros(shape, dtype=dtype, device=like.device),
        "count": torch.zeros((*shape, num_places), dtype=dtype, device=like.device),
    }


@dataclass(frozen=True)
class Rules:
    """How engrams are reminded, and how long they live.

    Args:
        num_short: places of short-term memory; older ones become long-term.
        remind_short, remind_long: at most so many are reminded.
        depth: steps along the co-fire counts from each long-term engram that is found first.
        life: of a new engram, in segments.
        gain: a reminded engram lives longer by `gain` times its share of the attention, relative to an even share.
    """

    num_short: int
    remind_short: int
    remind_long: int
    depth: int
    life: float
    gain: float

    @torch.no_grad()
    def joined(self, engrams: State, working_BmD: Tensor, is_there_B: Tensor) -> State:
        """The engrams with new working ones behind them; rows that have none get empty places."""
        num_rows, count = working_BmD.shape[:2]
        places = engrams["kind"].shape[1]
        kind = (WORKING * is_there_B.long()).unsqueeze(1).expand(-1, count)
        grown = engrams["count"].new_zeros(num_rows, places + count, places + count)
        grown[:, :places, :places] = engrams["count"]
        return {
            "data": torch.cat((engrams["data"], working_BmD.to(engrams["data"].dtype)), 1),
            "kind": torch.cat((engrams["kind"], kind), 1),
            "life": torch.cat((engrams["life"], self.life * (kind > 0)), 1),
            "count": grown,
        }

    @torch.no_grad()
    def reminded(self, engrams: State, step_B: Tensor) -> Tensor:
        """(B, N) True for the engrams that the working ones remind of.

        The nearest short-term ones, by -|w - e|^2 in the mean over working ones w; for each the long-term one with the
        largest co-fire count, ties by a number that depends on the place and `step_B` alone; from there along the
        largest counts, never twice to the same; of those found, the nearest.
        """
        kind, count = engrams["kind"], engrams["count"]
        is_working, is_short, is_long = (kind == each for each in (WORKING, SHORT, LONG))
        # squares in the mean over working ones: that from their mean, and a number that all engrams share
        total_B1D = (engrams["data"] * is_working.unsqueeze(2)).sum(1, keepdim=True)
        middle_B1D = total_B1D / is_working.sum(1).clamp(min=1).view(-1, 1, 1)
        near_BN = (engrams["data"] - middle_B1D).square().sum(2).neg()
        short = _nearest(near_BN, is_short & is_working.any(1, keepdim=True), self.remind_short)
        reachable = is_long.clone()
        # ties break by less than a count
        tie_BNN = ties(step_B, kind.shape[1]).unsqueeze(1)
        first_BN, has_first = _largest(count + tie_BNN, reachable)
        starts = short & has_first
        found = _marked(first_BN, starts)
        last_BN, walks = first_BN, starts
        reachable &= ~found
        for _ in range(self.depth):
            from_last = count.gather(1, last_BN.unsqueeze(2).expand_as(count))
            last_BN, has_next = _largest(from_last, reachable)
            walks = walks & has_next
            step = _marked(last_BN, walks)
            found |= step
            reachable &= ~step
        return short | _nearest(near_BN, found, self.remind_long)

    @torch.no_grad()
    def aged(self, engrams: State, reminded_BN: Tensor, share_BN: Tensor, num_places: int) -> State:
        """After a segment: who fired together is counted, who was looked at lives longer, all grow older.

        Args:
            share_BN: of the attention that each reminded engram got, in the mean over tokens, heads and blocks.
            num_places: of the result; where more live, the long-term ones with the least life left are dropped.
        """
        fired = (reminded_BN | (engrams["kind"] == WORKING)).to(engrams["count"].dtype)
        count = engrams["count"] + fired.unsqueeze(2) * fired.unsqueeze(1)
        gained = self.gain * share_BN * reminded_BN.sum(1, keepdim=True) * reminded_BN
        life = engrams["life"] + gained - 1
        kind = torch.where(engrams["kind"] == WORKING, SHORT, engrams["kind"])
        # places are in order of age: the last ones are the newest
        is_short = kind == SHORT
        younger = is_short.flip(1).cumsum(1).flip(1)
        kind = torch.where(is_short & (younger > self.num_short), LONG, kind)
        kind = torch.where(life > 0, kind, EMPTY)
        return compact({"data": engrams["data"], "kind": kind, "life": life, "count": count}, num_places)


def compact(engrams: State, num_places: int) -> State:
    """The living, in order of age, at the end of `num_places` places; long-term ones of the least life make room."""
    kind, life = engrams["kind"], engrams["life"]
    lives = kind > 0
    stays = life.masked_fill(kind == SHORT, float("inf")).masked_fill(~lives, float("-inf"))
    by_life = stays.argsort(dim=1, descending=True, stable=True)
    rank = by_life.argsort(dim=1)
    lives &= rank < num_places
    # False before True, each in its order
    order = lives.long().argsort(dim=1, stable=True)[:, -num_places:]
    kept = lives.gather(1, order)
    count = engrams["count"].gather(1, order.unsqueeze(2).expand(-1, -1, kind.shape[1]))
    count = count.gather(2, order.unsqueeze(1).expand(-1, order.shape[1], -1))
    data = engrams["data"].gather(1, order.unsqueeze(2).expand(-1, -1, engrams["data"].shape[2]))
    return {
        "data": data * kept.unsqueeze(2),
        "kind": kind.gather(1, order) * kept,
        "life": life.gather(1, order) * kept,
        "count": count * kept.unsqueeze(2) * kept.unsqueeze(1),
    }


def ties(step_B: Tensor, num_places: int) -> Tensor:
    """(B, N) numbers in [0, 1) from the step and the place alone: a draw that a row has to itself.

    A counter-based generator (an integer hash): nothing to save, and the same for a row in any batch.
    """
    x = step_B.unsqueeze(1) * 0x9E3779B1 + torch.arange(num_places, device=step_B.device) * 0x85EBCA6B
    mask = 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x & mask
        # 32-bit products in two halves, so that int64 does not overflow
        x = x ^ (x >> shift)
        x = ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & mask
    # as many bits as float32 holds, or the largest would round to 1
    return (((x ^ (x >> 16)) & mask) >> 8).to(torch.float32) / 2**24


def _nearest(near_BN: Tensor, among: Tensor, count: int) -> Tensor:
    """(B, N) True for the `count` largest among some."""
    score = near_BN.masked_fill(~among, float("-inf"))
    order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(among).scatter(1, order, True) & among


def _largest(count_BNN: Tensor, reachable_BN: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) for each place the reachable one with the largest count, the first of equals; and whether there is one."""
    score = count_BNN.masked_fill(~reachable_BN.unsqueeze(1), -1.0)
    best, place = score.max(2)
    return place, best >= 0


def _marked(place_BN: Tensor, walks_BN: Tensor) -> Tensor:
    """(B, N) True for the places that a walk stands on."""
    hits = torch.zeros_like(place_BN).scatter_add(1, place_BN, walks_BN.long())
    return hits > 0
