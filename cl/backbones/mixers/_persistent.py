"""Sliding-window attention that also sees a few learned tokens from everywhere.

Shape legend: B rows, T tokens, H heads, N blocks, S keys, P persistent tokens, D width, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._cells import ages
from cl.backbones._state import State
from cl.backbones.mixers._rotary import rotated
from cl.backbones.mixers.attention import Attention, _visible


class PersistentAttention(Attention):
    """Attention over a window whose keys and values begin with P learned ones; gives the heads, without an output map.

    Positions are counted from the document's start, where the persistent ones stand.

    Source: the persistent memory of Titans (Behrouz et al., 2024). Differences: learned as keys and values, not as
        tokens that are projected to them.
    """

    def __init__(
        self, width: int, *, num_heads: int, window: int, num_persistent: int, rope_base: float | None
    ) -> None:
        super().__init__(width, num_heads=num_heads, window=window, rope_base=rope_base)
        del self.out
        shape = (num_heads, num_persistent, self.head_width)
        self.persistent_key = nn.Parameter(torch.randn(shape) * self.head_width**-0.5)
        self.persistent_value = nn.Parameter(torch.randn(shape) * self.head_width**-0.5)

    def init_state(self, num_rows: int) -> State:
        state = super().init_state(num_rows)
        del state["position"]
        return state | {"age": self.fresh(num_rows)}

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        mode: str = "chunk",
        query_shift: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Heads (B, T, D), one after the other."""
        state = self.init_state(x_BTD.shape[0]) if state is None else state
        age_BT = ages(x_BTD.shape[1], reset, state["age"])
        q, k, v = (self._heads(p(x_BTD), self.num_heads) for p in (self.query, self.key, self.value))
        if self.rope_base is not None:
            cos, sin = turns(age_BT, self.head_width, self.rope_base)
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k = torch.cat((state["key"].to(k.dtype), k), 2)
        v = torch.cat((state["value"].to(v.dtype), v), 2)
        document_BS = self._documents(x_BTD, reset, state)
        left = self._left(k, v, document_BS, 0)
        del left["position"]
        if self.window is not None and x_BTD.shape[1] > 2 * self.window:
            o_BHTK = self._in_blocks(q, k, v, document_BS)
        else:
            o_BHTK = self._softmax(q, k, v, _visible(x_BTD.shape[1], document_BS, self.window))
        return o_BHTK.transpose(1, 2).flatten(2), left | {"age": age_BT[:, -1]}

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        k, v = with_persistent(k, self.persistent_key), with_persistent(v, self.persistent_value)
        return super()._softmax(q, k, v, F.pad(mask, (self.persistent_key.shape[1], 0), value=True))


def turns(place_BT: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, K / 2) of rotary angles, in the precision of a state; each row has places of its own."""
    steps = torch.arange(0, head_width, 2, dtype=torch.float64, device=place_BT.device)
    angle = (place_BT.double()[..., None] * base ** (-steps / head_width)).unsqueeze(1)
    return angle.cos().to(place_BT.dtype), angle.sin().to(place_BT.dtype)


def with_persistent(x: Tensor, persistent_HPK: Tensor) -> Tensor:
    """(B, H, [N,] P + S, K)."""
    seen = persistent_HPK.to(x.dtype)
    seen = seen.unsqueeze(1) if x.dim() == 5 else seen
    return torch.cat((seen.expand(*x.shape[:-2], -1, -1), x), -2)
