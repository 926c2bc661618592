"""Associative Recurrent Memory Transformer: memory tokens write a fast weight matrix in every block, once a segment.

    before block l:  h <- h + phi(h W_q) A / (z . phi(h W_q) + eps)
    after it, with the outputs u_1 .. u_m of the memory tokens, all against the same A and z:
        k = phi(u W_k);  v_old = k A / (z . k + eps);  beta = sigmoid(u W_b)
        A <- A + sum_i beta_i k_i (x) (u_i W_v - v_old_i)
        z <- z + sum_i gamma_i k_i,     gamma_i = clip(1 - z . k_i / (|k_i|^2 + eps), 0, 1), without a gradient

phi is DPFP: r = [relu(x), relu(-x)], then r times itself rolled by 1 .. nu. The tokens themselves are not handed on.

Shape legend: B rows, T tokens, D width, m memory tokens, M width of a memory's queries, K = 2 nu M.
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
from cl.backbones._segments import Segment, Segmented, Slots, kept
from cl.backbones._state import State, where_rows
from cl.core import StreamInfo

EPSILON = 1e-5


class Armt(Segmented):
    """Memory tokens that write associations into every block of any decoder.

    Args:
        segment: T, tokens of a segment.
        num_memory: m.
        memory_width: M.
        degree: nu.
        truncate: k, segments after which the memory is detached; None never does.
        is_replayed: keep memories at the borders only, and read segments again in the backward pass.
        decoder: options of `Gpt`.

    Cost: that of the decoder times 1 + m / T, K D more a token and block to read, 2 m K D a segment and block to write;
        the state holds K (D + 1) numbers a block.
    Source: Rodkin et al., "Associative Recurrent Memory Transformer", 2024, and the code in
        RodkinIvan/associative-recurrent-memory-transformer. Differences: A and z are state, not attributes that a
        checkpoint loses; W_v starts small and not at zero, so that all projections learn from the first step; gamma
        is 1 for every new key (there eps is taken from it after the first segment, and a key much smaller than that
        adds nothing to z).
    """

    toy = {"segment": 4, "num_memory": 2, "memory_width": 4}
    lifetime = Lifetime(fast=("A", "z"))

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_memory: int = 4,
        memory_width: int = 16,
        degree: int = 3,
        truncate: int | None = None,
        is_replayed: bool = False,
        **decoder: Any,
    ) -> None:
        for name, value in (("num_memory", num_memory), ("memory_width", memory_width), ("degree", degree)):
            require_width(name, value)
        super().__init__(info, segment, truncate, is_replayed, **decoder)
        self.slots = Slots(num_memory, self.num_features)
        self.memories = nn.ModuleList(Associations(self.num_features, memory_width, degree) for _ in self.blocks)
        draw(self.memories, len(self.blocks))

    def fresh_memory(self, num_rows: int) -> State:
        weight = self.slots.weight
        shape = (num_rows, self.memories[0].key_width)
        zeros = torch.zeros(shape, dtype=torch.promote_types(torch.float32, weight.dtype), device=weight.device)
        return {
            str(number): {"A": zeros.unsqueeze(2).expand(-1, -1, self.num_features), "z": zeros}
            for number in range(len(self.memories))
        }

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        count, total, after = self.slots.weight.shape[0], Auxiliary(), dict(memory)
        x_BND, reset = part.x, part.around(0, count if part.is_whole else 0)
        if part.is_whole:
            x_BND = torch.cat((x_BND, self.slots(len(x_BND)).to(x_BND.dtype)), 1)
        fresh = self.fresh_memory(len(x_BND))
        for number, associations in enumerate(self.memories):
            name = str(number)
            answer_BND = associations.read(x_BND, memory[name])
            x_BND = x_BND + (answer_BND if reset is None else answer_BND * (reset.cumsum(1) == 0).unsqueeze(2))
            x_BND, _ = self.through(number, x_BND, None, reset, part.mode, total)
            if part.is_whole:
                own = where_rows(part.is_left, fresh[name], memory[name])
                after[name] = associations.written(x_BND[:, -count:], own)
        return self.norm(x_BND[:, : part.x.shape[1]]), after, total


class Associations(nn.Module):
    """The memory of one block: A (B, K, D) and its normaliser z (B, K)."""

    def __init__(self, width: int, memory_width: int, degree: int) -> None:
        super().__init__()
        self.degree, self.key_width = degree, 2 * degree * memory_width
        self.query = nn.Linear(width, memory_width, bias=False)
        self.key = nn.Linear(width, memory_width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.strength = nn.Linear(width, 1)

    def read(self, x_BTD: Tensor, memory: State) -> Tensor:
        """What the memory answers to each token."""
        q_BTK = dpfp(kept(self.query(x_BTD)), self.degree)
        return _answer(q_BTK, memory).to(x_BTD.dtype)

    def written(self, u_BmD: Tensor, memory: State) -> State:
        """The memory after the memory tokens have written, all at once."""
        k_BmK, v_BmD = dpfp(kept(self.key(u_BmD)), self.degree), kept(self.value(u_BmD))
        strength_Bm1 = kept(self.strength(u_BmD)).sigmoid()
        known_Bm1 = k_BmK @ memory["z"].unsqueeze(2)
        new_Bm1 = (1 - known_Bm1 / (k_BmK.square().sum(-1, keepdim=True) + EPSILON)).clamp(0, 1).detach()
        change_BmD = strength_Bm1 * (v_BmD - _answer(k_BmK, memory))
        return {"A": memory["A"] + k_BmK.transpose(1, 2) @ change_BmD, "z": memory["z"] + (new_Bm1 * k_BmK).sum(1)}


def _answer(k_BTK: Tensor, memory: State) -> Tensor:
    return (k_BTK @ memory["A"]) / (k_BTK @ memory["z"].unsqueeze(2) + EPSILON)


def dpfp(x: Tensor, degree: int) -> Tensor:
    """Deterministic parameter-free projection: (..., M) -> (..., 2 nu M), never negative.

    Source: Schlag, Irie & Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers", 2021.

    Example:
        >>> dpfp(torch.tensor([2.0, -3.0]), degree=1).tolist()
        [6.0, 0.0, 0.0, 0.0]
    """
    r = torch.cat((F.relu(x), F.relu(-x)), -1)
    return torch.cat([r * r.roll(shift, -1) for shift in range(1, degree + 1)], -1)
