"""Memory as context: attention within a segment, over the segment and what the memory recalls for it.

Shape legend: B rows, T tokens, c tokens of a piece, n tokens kept of the open segment, D width, H heads, K width of a
head, P persistent tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._state import State, where_rows
from cl.backbones._windows import pieces
from cl.backbones.mixers._neural_branch import NeuralBranch
from cl.backbones.mixers._persistent import turns, with_persistent
from cl.backbones.mixers._rotary import rotated


class MemoryAsContext(nn.Module):
    """h_t = M(W_q x_t; W at the segment's start);  a_t = attention of x_t over [persistent; h_1 .. h_t; x_1 .. x_t];
    the memory reads a_t;  y_t = a_t * sigmoid(M(q(a_t); W_t)).

    A segment is a chunk of the memory's rule.

    Source: Titans (Behrouz et al., 2024), MAC, equations (21) to (25), checked in the paper's text. Differences: the
    source lets every token of a segment see what was recalled for all of them, and asks the memory after the whole
    segment was written, neither of which is causal; here token t sees h_1 .. h_t and asks W_t.
    """

    def __init__(
        self, branch: NeuralBranch, width: int, num_heads: int, num_persistent: int, rope_base: float | None
    ) -> None:
        super().__init__()
        self.num_heads, self.rope_base, self.segment = num_heads, rope_base, branch.rule.chunk
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.mix = nn.Linear(width, width, bias=False)
        shape = (num_heads, num_persistent, width // num_heads)
        self.persistent_key = nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)
        self.persistent_value = nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)

    def init_state(self, like_BX: Tensor) -> State:
        """Nothing kept, from zeros (B, 0)."""
        num_rows, width = like_BX.shape[0], self.persistent_key.shape[-1]
        empty = like_BX.new_zeros(num_rows, self.num_heads, 0, 2, width)
        return {"key": empty, "value": empty, "is_open": like_BX.new_zeros(num_rows, 0, dtype=torch.bool)}

    def forward(
        self, x_BTD: Tensor, branch: NeuralBranch, state: State, reset: Tensor | None, mode: str
    ) -> tuple[Tensor, State]:
        memory, seen = state["memory"], state["context"]
        fresh = branch.init_state(x_BTD.shape[0])
        outs = []
        for begin, end in pieces(x_BTD.shape[1], memory["rule"]["position"], reset, self.segment):
            if reset is not None:
                memory = where_rows(reset[:, begin], fresh, memory)
            piece_BcD, position_B = x_BTD[:, begin:end], memory["rule"]["position"]
            recalled_BcD = branch.recall(piece_BcD, memory)
            a_BcD, seen = self._attend(piece_BcD, recalled_BcD, position_B, seen)
            answer_BcD, memory = branch(a_BcD, memory, None, mode)
            outs.append(a_BcD * answer_BcD.sigmoid())
        return torch.cat(outs, 1), {"memory": memory, "context": seen}

    def _attend(self, x_BcD: Tensor, recalled_BcD: Tensor, position_B: Tensor, seen: State) -> tuple[Tensor, State]:
        num_tokens, num_heads = x_BcD.shape[1], self.num_heads
        pair = torch.stack((recalled_BcD, x_BcD), 2)
        q = self.query(x_BcD).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        k, v = (p(pair).unflatten(-1, (num_heads, -1)).permute(0, 3, 1, 2, 4) for p in (self.key, self.value))
        if self.rope_base is not None:
            place_Bc = position_B[:, None] + torch.arange(num_tokens, device=x_BcD.device)
            cos, sin = turns(place_Bc.to(seen["key"].dtype), q.shape[-1], self.rope_base)
            q, k = rotated(q, cos, sin), rotated(k, cos.unsqueeze(3), sin.unsqueeze(3))
        is_open_Bn = seen["is_open"] & (position_B > 0)[:, None]
        k = torch.cat((seen["key"].to(k.dtype), k), 2)
        v = torch.cat((seen["value"].to(v.dtype), v), 2)
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=x_BcD.device).tril()
        before = is_open_Bn[:, None].expand(-1, num_tokens, -1)
        visible = torch.cat((before, causal.expand(len(before), -1, -1)), 2).repeat_interleave(2, 2).unsqueeze(1)
        a = F.scaled_dot_product_attention(
            q,
            with_persistent(k.flatten(2, 3), self.persistent_key),
            with_persistent(v.flatten(2, 3), self.persistent_value),
            F.pad(visible, (self.persistent_key.shape[1], 0), value=True),
        )
        kept = slice(max(0, k.shape[2] - self.segment + 1), None)
        is_open_Bn = F.pad(is_open_Bn, (0, num_tokens), value=True)
        left = {
            "key": k[:, :, kept].to(seen["key"].dtype),
            "value": v[:, :, kept].to(seen["value"].dtype),
            "is_open": is_open_Bn[:, kept],
        }
        return self.mix(a.transpose(1, 2).flatten(2)), left
