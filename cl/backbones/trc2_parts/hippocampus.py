"""Store of events: what the network was thinking when something surprising began, and what came next.

read   q = unit(x W_q), k_n = unit(key_n W_k);  w = softmax over the 8 most similar slots of 16 q . k_n
       m = (sum_n w_n value_n) W_v;  e = sigmoid(16 (max_n q . k_n - theta))
       G = sigmoid([x, m] W_g + b);  feedback = sigmoid(a) (e * G * m) W_out
write  after the step: merge into a slot that is at least 0.95 alike, else take a free one, else the slot with the
       lowest utility + surprise / 2

x is the normalised hidden state after the early columns. Slots hold it raw and are projected when they are read, so
that what was stored yesterday is found with today's projections. An empty store gives exactly 0.

Source: our own specification of the hippocampal pathway of TRC2 (Khadangi, arXiv 2602.22479, v2 to v5): top-k content
read, delayed writes by surprise, 512 slots and the feedback gate are published, the rules are not.

Shape legend: B rows, T tokens, D width, M width of a key, N slots, k slots read, C candidates.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.core import UserError

SHARPNESS = 16.0
ALIKE, MERGE_RATE = 0.95, 0.1
USE_RATE, FADING = 0.01, 0.999
SLOTS_AT_ONCE = 4096


class Reading(NamedTuple):
    """What a read leaves for the write after it, which then needs no weights.

    Args:
        share: (B, N) how much of each slot a row read.
        stored: (N, M) keys of the slots, projected.
        own: (B, T, M) keys that the tokens would have, projected; None in evaluation.
        clock: () of the store when it was read.
    """

    share: Tensor
    stored: Tensor
    own: Tensor | None
    clock: Tensor


class Hippocampus(nn.Module):
    """The store, its projections and its gate.

    Args:
        width: D; keys are compared in D / 4 dimensions.
        rank: width of the feedback.
        num_slots: N.
        top: k.
        has_gate: False takes G = 1.

    Raises:
        UserError: more slots than fit into memory.

    Cost: per token (N + 13 D) D / 4 + (k + rank) D multiply-adds, per batch N D^2 / 4 more; the store holds 9/4 N D
        numbers.
    """

    keys: Tensor
    values: Tensor
    is_filled: Tensor
    use: Tensor
    surprise: Tensor
    step: Tensor
    experience: Tensor
    clock: Tensor
    written: Tensor

    def __init__(self, width: int, rank: int, num_slots: int = 512, top: int = 8, has_gate: bool = True) -> None:
        super().__init__()
        require_memory(num_slots, width)
        self.top = min(top, num_slots)
        narrow = max(1, width // 4)
        self.query = nn.Linear(width, narrow, bias=False)
        self.key = nn.Linear(width, narrow, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(2 * width, width) if has_gate else None
        self.feedback = nn.Linear(width, rank, bias=False)
        self.threshold = nn.Parameter(torch.tensor(0.5))
        self.opening = nn.Parameter(torch.tensor(-4.0))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(num_slots, width))
        self.register_buffer("is_filled", torch.zeros(num_slots, dtype=torch.bool))
        for name in ("use", "surprise"):
            self.register_buffer(name, torch.zeros(num_slots))
        for name in ("step", "experience"):
            self.register_buffer(name, torch.zeros(num_slots, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        # projections as the last write left them, which no later step reads: they are not saved
        self.register_buffer("written", torch.zeros(num_slots, narrow), persistent=False)

    def forward(self, x_BTD: Tensor, is_read: bool = True) -> tuple[Tensor, Reading]:
        """(B, T, rank) feedback, and what `write` will need.

        Args:
            is_read: False answers as an empty store does.
        """
        stored_NM = self.key(self.keys)
        similarity_BTk, slot_BTk = self._most_alike(x_BTD, stored_NM, is_read)
        is_real_BTk = similarity_BTk >= -1
        weight_BTk = torch.where(is_real_BTk, (SHARPNESS * similarity_BTk).softmax(-1), 0)
        event_BT1 = torch.sigmoid(SHARPNESS * (similarity_BTk[..., :1] - self.threshold))
        recalled_BTD = self._recalled(slot_BTk, weight_BTk).to(x_BTD.dtype)
        m_BTD = self.value(recalled_BTD)
        gated_BTD = event_BT1 * m_BTD
        if self.gate is not None:
            gated_BTD = torch.sigmoid(self.gate(torch.cat((x_BTD.detach(), m_BTD), -1))) * gated_BTD
        feedback_BTR = torch.sigmoid(self.opening) * self.feedback(gated_BTD.to(m_BTD.dtype))
        with torch.no_grad():
            share_BN = weight_BTk.new_zeros(len(x_BTD), len(self.use))
            share_BN.scatter_add_(1, slot_BTk.flatten(1), (event_BT1 * weight_BTk).flatten(1).to(share_BN.dtype))
            own_BTM = self.key(x_BTD) if self.training else None
        return feedback_BTR, Reading(share_BN, stored_NM.detach(), own_BTM, self.clock.clone())

    def _most_alike(self, x_BTD: Tensor, stored_NM: Tensor, is_read: bool) -> tuple[Tensor, Tensor]:
        """Similarities (B, T, k) and slots of the best ones, the best first; -2 where a slot is empty.

        Exact whatever the number of slots: pieces of the store are searched in turn, and the best so far kept.
        """
        # comparisons in full precision: the best slots must not hang on rounding, and empty ones have length 0
        dtype = torch.promote_types(torch.float32, x_BTD.dtype)
        q_BTM = F.normalize(self.query(x_BTD).to(dtype), dim=-1)
        is_filled_N = self.is_filled & is_read
        best, slots = [], []
        for low in range(0, len(self.keys), SLOTS_AT_ONCE):
            piece = slice(low, low + SLOTS_AT_ONCE)
            k_NM = F.normalize(stored_NM[piece].to(dtype), dim=-1)
            with torch.autocast(x_BTD.device.type, enabled=False):
                similarity_BTN = (q_BTM @ k_NM.T).clamp(-1, 1).masked_fill(~is_filled_N[piece], -2)
            top, where = similarity_BTN.topk(min(self.top, similarity_BTN.shape[-1]), -1)
            best.append(top)
            slots.append(where + low)
        if len(best) == 1:
            return best[0], slots[0]
        top_BTk, where_BTk = torch.cat(best, -1).topk(self.top, -1)
        return top_BTk, torch.cat(slots, -1).gather(-1, where_BTk)

    def _recalled(self, slot_BTk: Tensor, weight_BTk: Tensor) -> Tensor:
        """(B, T, D) weighted sums of values, without a copy of every value for every token."""
        values_ND = self.values.to(weight_BTk.dtype)
        sums = F.embedding_bag(
            slot_BTk.flatten(0, 1), values_ND, mode="sum", per_sample_weights=weight_BTk.flatten(0, 1)
        )
        return sums.unflatten(0, slot_BTk.shape[:2])

    # writing

    @torch.no_grad()
    def tick(self, read_N: Tensor) -> None:
        """Time passes: surprise fades, and utility follows what was read (1 is an even share of all reading)."""
        share_N = read_N / read_N.sum().clamp(min=1e-12) * len(read_N)
        self.use.lerp_(share_N.to(self.use.dtype), USE_RATE)
        self.surprise.mul_(FADING)
        self.clock += 1

    @torch.no_grad()
    def write(
        self,
        keys_CD: Tensor,
        values_CD: Tensor,
        surprise_C: Tensor,
        experience_C: Tensor,
        own_CM: Tensor,
        stored_NM: Tensor,
        clock: Tensor,
    ) -> None:
        """Store candidates, one after the other: each may be merged with the ones before it.

        Args:
            own_CM, stored_NM: keys of candidates and slots, projected; the projection is linear, so that a merged key
                is projected by merging projections.
            clock: when they were. Slots written since are known as that write left them: the micro-batches of a step
                are all read before the first of them is written.
        """
        keys_CD, values_CD = keys_CD.to(self.keys.dtype), values_CD.to(self.values.dtype)
        surprise_C = surprise_C.to(self.surprise.dtype)
        own_CM, is_newer_N1 = own_CM.to(self.keys.dtype), (self.step > clock).unsqueeze(1)
        stored_NM = torch.where(is_newer_N1, self.written, stored_NM.to(self.keys.dtype))
        for number in range(len(keys_CD)):
            likeness_N = F.cosine_similarity(stored_NM, own_CM[number : number + 1])
            alike, twin = likeness_N.masked_fill(~self.is_filled, -2).max(0)
            is_twin = alike >= ALIKE
            # empty slots are worth least; chosen without a look at the numbers, which would stall a GPU
            worth_N = (self.use + 0.5 * self.surprise).masked_fill(~self.is_filled, -torch.inf)
            slot = torch.where(is_twin, twin, worth_N.argmin()).unsqueeze(0)
            pairs = ((self.keys, keys_CD), (self.values, values_CD), (stored_NM, own_CM))
            for store, new in ((store, found[number]) for store, found in pairs):
                store[slot] = torch.where(is_twin, torch.lerp(store[slot], new, MERGE_RATE), new)
            known, surprise = self.surprise[slot], surprise_C[number]
            self.surprise[slot] = torch.where(is_twin, torch.maximum(known, surprise), surprise)
            self.use[slot] = torch.where(is_twin, self.use[slot], 0)
            self.experience[slot] = torch.where(is_twin, self.experience[slot], experience_C[number])
            self.is_filled[slot] = True
            self.step[slot] = self.clock
        self.written.copy_(stored_NM)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        saved = state_dict.get(f"{prefix}keys")
        if saved is not None and len(saved) != len(self.keys):
            raise UserError(
                f"backbone.num_slots is {len(self.keys)}, but the store that was saved has {len(saved)} slots; it "
                "must go on with as many"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)


def require_memory(num_slots: int, width: int) -> None:
    """Whether the store fits.

    Raises:
        UserError: it would take more than the memory of this machine.
    """
    slot_bytes = 8 * width + 4 * max(1, width // 4) + 25
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_slots * slot_bytes > have:
        raise UserError(
            f"backbone.num_slots is {num_slots}, which would take {num_slots * slot_bytes / 1e9:.0f} GB; it must be at "
            f"most {have // slot_bytes} in the {have / 1e9:.0f} GB of this machine"
        )
