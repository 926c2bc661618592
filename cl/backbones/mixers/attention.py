"""Causal softmax attention within documents: grouped queries, rotary or no positions, all of the past or a window.

Shape legend: B rows, T tokens now, P tokens before, S = P + T, D width, H heads, G key-value heads, K width of a head,
W window, N blocks of W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer, require_mode
from cl.backbones._state import State
from cl.backbones.mixers._rotary import require_rope_base, rotary_angles, rotated
from cl.core import UserError


class Attention(Mixer):
    """Causal grouped-query attention with rotary positions, within documents.

    o_t = sum_{s <= t, t - s < window, document(s) = document(t)} softmax(q_t . k_s / sqrt(K)) v_s

    Args:
        width: D.
        num_heads: H; D must be a multiple of it, and D / H even.
        num_kv_heads: G, heads that share their keys and values in groups of H / G; None takes H, plain attention.
        window: tokens that a token sees, itself among them; None shows it all. The state holds no more than that.
        rope_base: of the rotary angles; a larger one for a longer context. None gives no positions (NoPE).
        dropout: of attention weights, in training.

    Raises:
        UserError: a value outside its range.

    Cost: 2 D^2 (1 + G / H) + 2 S D multiply-adds a token (2 W D with a window, for T above 2 W); the state holds
        2 S G K numbers a row (2 (W - 1) G K with a window).
    Source: Vaswani et al., 2017; rotary positions from Su et al., 2021; groups from Ainslie et al., 2023; windows as in
        Mistral (Jiang et al., 2023); no positions from Kazemnejad et al., 2023.
    Differences: positions are not counted anew in each document; rotary angles see differences only.
    """

    lifetime = Lifetime(fast=("key", "value", "document", "position"), resets=("key", "value"))
    examples = ("attention", "attention(num_kv_heads=1, rope_base=none)", "attention(window=3)")

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        window: int | None = None,
        rope_base: float | None = 10_000.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_width("num_heads", num_heads)
        require_width("num_kv_heads", num_kv_heads)
        if width % num_heads or width // num_heads % 2:
            raise UserError(
                f"backbone.width is {width} for backbone.num_heads={num_heads}; a multiple of twice the heads is needed"
            )
        if num_heads % num_kv_heads:
            raise UserError(f"backbone.num_kv_heads is {num_kv_heads}; it must divide backbone.num_heads={num_heads}")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise UserError(f"window of attention is {window!r}; it must be an integer of at least 1, or none")
        require_rope_base(rope_base)
        if not 0 <= dropout < 1:
            raise UserError(f"backbone.dropout is {dropout!r}; it must be a number from 0 to below 1")
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, num_kv_heads, width // num_heads
        self.window, self.rope_base, self.dropout = window, rope_base, dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        empty = self.fresh(num_rows, self.num_kv_heads, 0, self.head_width)
        number = torch.zeros((), dtype=torch.int64, device=empty.device)
        return {"key": empty, "value": empty, "document": number.new_zeros(num_rows, 0), "position": number.cpu()}

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        mode: str = "chunk",
        query_shift: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As every mixer; `query_shift` (B, T, D) is added to the queries before they are rotated."""
        require_mode(mode)
        if mode == "recurrent" and x_BTD.shape[1] > 1:
            if query_shift is not None:
                raise ValueError("shifted queries are read in chunks, or one token at a time")
            return self.token_by_token(x_BTD, state, reset)
        q_BTD = self.query(x_BTD) if query_shift is None else self.query(x_BTD) + query_shift
        return self.attend(q_BTD, self.key(x_BTD), self.value(x_BTD), state, reset)

    def attend(
        self, q_BTD: Tensor, k_BTX: Tensor, v_BTX: Tensor, state: State | None, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        """`forward` of what the projections of x are, all heads side by side, before rotation."""
        state = None if state is None or not state["key"].shape[2] else state
        q_BHTK = self._heads(q_BTD, self.num_heads)
        k_BGTK, v_BGTK = (self._heads(x, self.num_kv_heads) for x in (k_BTX, v_BTX))
        position = 0 if state is None else int(state["position"])
        if self.rope_base is not None:
            dtype = torch.promote_types(torch.float32, q_BHTK.dtype)
            angles = rotary_angles(position, q_BTD.shape[1], self.head_width, self.rope_base, q_BTD.device, dtype)
            q_BHTK, k_BGTK = rotated(q_BHTK, *angles), rotated(k_BGTK, *angles)
        document_BS = self._documents(q_BTD, reset, state)
        if state is not None:
            k_BGTK = torch.cat((state["key"].to(k_BGTK.dtype), k_BGTK), 2)
            v_BGTK = torch.cat((state["value"].to(v_BGTK.dtype), v_BGTK), 2)
        left = self._left(k_BGTK, v_BGTK, document_BS, position + q_BTD.shape[1])
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            k_BGTK, v_BGTK = k_BGTK.repeat_interleave(group, 1), v_BGTK.repeat_interleave(group, 1)
        if self.window is not None and q_BTD.shape[1] > 2 * self.window:
            o_BHTK = self._in_blocks(q_BHTK, k_BGTK, v_BGTK, document_BS)
        else:
            is_plain = state is None and reset is None and (self.window is None or q_BTD.shape[1] <= self.window)
            mask = None if is_plain else _visible(q_BTD.shape[1], document_BS, self.window)
            o_BHTK = self._softmax(q_BHTK, k_BGTK, v_BGTK, mask)
        y_BTD: Tensor = self.out(o_BHTK.transpose(1, 2).flatten(2))
        return y_BTD, left

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, self.head_width).transpose(1, 2)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)

    @staticmethod
    def _documents(x_BTD: Tensor, reset_BT: Tensor | None, state: State | None) -> Tensor:
        """(B, S) number of the document that each token lies in."""
        if reset_BT is None:
            document_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
        else:
            document_BT = reset_BT.long().cumsum(1)
        if state is None or not state["document"].shape[1]:
            return document_BT
        before_BP: Tensor = state["document"]
        return torch.cat((before_BP, before_BP[:, -1:] + document_BT), 1)

    def _left(self, k_BGSK: Tensor, v_BGSK: Tensor, document_BS: Tensor, position: int) -> State:
        """What later tokens may still see; one token more where they see nothing, for the number of its document."""
        kept = slice(0 if self.window is None else max(0, k_BGSK.shape[2] - max(1, self.window - 1)), None)
        dtype = torch.promote_types(torch.float32, k_BGSK.dtype)
        return {
            "key": k_BGSK[:, :, kept].to(dtype),
            "value": v_BGSK[:, :, kept].to(dtype),
            "document": document_BS[:, kept],
            "position": torch.tensor(position),
        }

    def _in_blocks(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, document_BS: Tensor) -> Tensor:
        """A window over a long text: W queries at a time against the 2 W keys that end with theirs."""
        assert self.window is not None
        size, num_tokens = self.window, q_BHTK.shape[2]
        before, after = size - (k_BHSK.shape[2] - num_tokens), -num_tokens % size
        q_BNWHK = F.pad(q_BHTK.transpose(1, 2), (0, 0, 0, 0, 0, after)).unflatten(1, (-1, size))
        padded = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, before, after)) for x in (k_BHSK, v_BHSK))
        # joined, not unfolded, whose backward is slow; and blocks as rows, which is what torch has a kernel for
        blocks = (x.unflatten(1, (-1, size)) for x in padded)
        k_BN2HK, v_BN2HK = (torch.cat((x[:, :-1], x[:, 1:]), 2) for x in blocks)
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_BNWHK, k_BN2HK, v_BN2HK))
        # padding belongs to no document; the last queries are padding too, and see themselves
        document_BN2 = F.pad(document_BS, (before, after), value=-1).unfold(1, 2 * size, size)
        own_BNW2 = document_BN2[..., size:, None] == document_BN2[..., None, :]
        distance_W2 = (torch.arange(size, 2 * size)[:, None] - torch.arange(2 * size)).to(own_BNW2.device)
        mask = (own_BNW2 & (distance_W2 >= 0) & (distance_W2 < size)).flatten(0, 1).unsqueeze(1)
        o_BNHWK = self._softmax(q, k, v, mask).unflatten(0, q_BNWHK.shape[:2])
        return o_BNHWK.transpose(1, 2).flatten(2, 3)[:, :, :num_tokens]


def _visible(num_tokens: int, document_BS: Tensor, window: int | None) -> Tensor:
    """(B, 1, T, S) True where a token may look."""
    num_seen = document_BS.shape[1]
    places = torch.arange(num_seen, device=document_BS.device)
    distance_TS = places[-num_tokens:].unsqueeze(1) - places
    visible_TS = distance_TS >= 0 if window is None else (distance_TS >= 0) & (distance_TS < window)
    own_BTS = document_BS[:, -num_tokens:].unsqueeze(2) == document_BS.unsqueeze(1)
    return (own_BTS & visible_TS).unsqueeze(1)
