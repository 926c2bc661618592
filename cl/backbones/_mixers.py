"""What moves information between the tokens of a block: attention; others join `MIXERS` under a name of their own.

A mixer maps x (B, T, D) to y (B, T, D), position by position from what came before:

    y, state = mixer(x, reset, state)

`reset` (B, T) is True where a document starts: nothing before it may be seen from there on. `state` is what earlier
tokens left behind, a dict of tensors; with it a text may be read in pieces, and the pieces give what the whole gives.

Shape legend: B rows, T tokens now, S tokens in all, D width, H heads, G key-value heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.core import UserError

State = dict[str, Tensor]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, within documents.

    o_t = sum_{s <= t, document(s) = document(t)} softmax(q_t . k_s / sqrt(K)) v_s

    Args:
        width: D.
        num_heads: H; D must be a multiple of it, and D / H even.
        num_kv_heads: G, heads that share their keys and values in groups of H / G; H is plain multi-head attention.
        rope_base: of the rotary angles; a larger one for a longer context.
        dropout: of attention weights, in training.

    Cost: 2 D^2 (1 + G / H) + 2 S D multiply-adds a token.
    Source: Vaswani et al., 2017; rotary positions from Su et al., 2021; groups from Ainslie et al., 2023.
    Differences: positions are not counted anew in each document; rotary angles see differences only.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope_base: float = 10_000.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if width % num_heads or width // num_heads % 2:
            raise UserError(
                f"backbone.width is {width} for backbone.num_heads={num_heads}; a multiple of twice the heads is needed"
            )
        if num_heads % num_kv_heads:
            raise UserError(f"backbone.num_kv_heads is {num_kv_heads}; it must divide backbone.num_heads={num_heads}")
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, num_kv_heads, width // num_heads
        self.rope_base, self.dropout = rope_base, dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, reset_BT: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        q_BHTK = self._heads(self.query(x_BTD), self.num_heads)
        k_BGTK = self._heads(self.key(x_BTD), self.num_kv_heads)
        v_BGTK = self._heads(self.value(x_BTD), self.num_kv_heads)
        start = 0 if state is None else state["key"].shape[2]
        angles = rotary_angles(start, x_BTD.shape[1], self.head_width, self.rope_base, x_BTD.device)
        q_BHTK, k_BGTK = rotated(q_BHTK, *angles), rotated(k_BGTK, *angles)
        document_BS = None if reset_BT is None else reset_BT.long().cumsum(1)
        if state is not None:
            if document_BS is not None and "document" in state:
                document_BS = torch.cat((state["document"], state["document"][:, -1:] + document_BS), 1)
            k_BGTK = torch.cat((state["key"], k_BGTK), 2)
            v_BGTK = torch.cat((state["value"], v_BGTK), 2)
        left = {"key": k_BGTK, "value": v_BGTK} | ({} if document_BS is None else {"document": document_BS})
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            k_BGTK, v_BGTK = k_BGTK.repeat_interleave(group, 1), v_BGTK.repeat_interleave(group, 1)
        mask = None
        if document_BS is not None or start:
            mask = _visible(x_BTD.shape[1], start, document_BS, x_BTD.device)
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, mask, self.dropout if self.training else 0.0, is_causal=mask is None
        )
        y_BTD: Tensor = self.out(o_BHTK.transpose(1, 2).flatten(2))
        return y_BTD, left

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, self.head_width).transpose(1, 2)


def _visible(num_tokens: int, start: int, document_BS: Tensor | None, device: torch.device) -> Tensor:
    """(T, S) or (B, 1, T, S): True where a token may look."""
    rows = torch.arange(start, start + num_tokens, device=device)
    visible_TS = torch.arange(start + num_tokens, device=device) <= rows.unsqueeze(1)
    if document_BS is None:
        return visible_TS
    own_BTS = document_BS[:, start:].unsqueeze(2) == document_BS.unsqueeze(1)
    return (own_BTS & visible_TS).unsqueeze(1)


def rotary_angles(
    start: int, num_tokens: int, head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, K / 2) of position * base^(-2i / K), in float32."""
    return _angles(start, num_tokens, head_width, base, str(device))


@lru_cache(maxsize=16)
def _angles(start: int, num_tokens: int, head_width: int, base: float, device: str) -> tuple[Tensor, Tensor]:
    # made outside of inference mode, so that training may use what an evaluation made first
    with torch.inference_mode(False), torch.no_grad():
        rate = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device=device) / head_width)
        angle = torch.arange(start, start + num_tokens, dtype=torch.float64, device=device).unsqueeze(1) * rate
        return angle.cos().float(), angle.sin().float()


def rotated(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + K/2}) turned by its angle; keeps the dtype."""
    left, right = x_BHTK.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x_BHTK.dtype)


MIXERS: dict[str, Callable[..., nn.Module]] = {"attention": Attention}
"""By the name that `backbone.mixers` gives them."""


def make_mixer(name: str, **options: object) -> nn.Module:
    """The mixer with this name.

    Raises:
        UserError: there is none.
    """
    if name not in MIXERS:
        raise UserError(f"backbone.mixers names {name!r}; the mixers are {', '.join(MIXERS)}")
    return MIXERS[name](**options)
