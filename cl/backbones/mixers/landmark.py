"""Attention by landmarks: a token is reached through the landmark that ends its block.

    every (n + 1)-th token of a document is a landmark; for a query in block b
    outer = softmax over the tokens of block b up to the query, and the landmarks of earlier blocks
    weight of a token: its outer weight in block b; in block j < b, outer[landmark j] * softmax within block j

Landmarks give weight on and no value of their own. At evaluation a query may be held to the `top` landmarks, so that
the rest of the past need not be fetched.

Shape legend: B rows, T tokens now, P tokens before, S = P + T, D width, H heads, K width of a head, n tokens of a block
without its landmark, J blocks of all documents of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer
from cl.backbones._state import State
from cl.backbones.mixers._rotary import require_rope_base, rotary_angles, rotated
from cl.core import UserError

COUNTS = ("document", "row")


class Landmark(Mixer):
    """Grouped softmax over blocks and their landmarks, within documents.

    Args:
        width: D.
        num_heads: H; D must be a multiple of it, and D / H even.
        block: n, tokens between landmarks. Every (n + 1)-th token that is read counts as one: `backbone=landmark` puts
            them in; without it they are tokens of the text.
        by: count tokens from the start of the "document", or of the "row"; landmarks that are put in are counted so.
        top: landmarks that a query and head may follow at evaluation; None lets them follow all.
        rope_base: of the rotary angles; None gives no positions.

    Raises:
        UserError: a value outside its range.

    Cost: 4 D^2 + 2 S D multiply-adds a token; the state holds 2 S D numbers a row.
    Source: Mohtashami & Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023, and
        `landmark_grouped_softmax` in epfml/landmark-attention. Differences: positions at retrieval are the tokens' own,
        where the paper maps fetched blocks to the positions before the local ones.
    """

    lifetime = Lifetime(fast=("key", "value", "document", "place", "position"), resets=("key", "value"))
    examples = ("landmark(block=3)", "landmark(block=2, top=1, rope_base=none)")

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        block: int = 50,
        by: str = "document",
        top: int | None = None,
        rope_base: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        require_width("num_heads", num_heads)
        require_rope_base(rope_base)
        if width % num_heads or width // num_heads % 2:
            raise UserError(
                f"backbone.width is {width} for backbone.num_heads={num_heads}; a multiple of twice the heads is needed"
            )
        require_width("block", block)
        if top is not None:
            require_width("top", top)
        if by not in COUNTS:
            raise UserError(f"by of landmark is {by!r}; it must be one of {', '.join(COUNTS)}")
        self.by = by
        self.num_heads, self.block, self.top, self.rope_base = num_heads, block, top, rope_base
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def init_state(self, num_rows: int) -> State:
        width = self.query.in_features
        empty = self.fresh(num_rows, self.num_heads, 0, width // self.num_heads)
        none = torch.zeros(num_rows, 0, dtype=torch.int64, device=empty.device)
        return {"key": empty, "value": empty, "document": none, "place": none, "position": torch.tensor(0)}

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        q, k, v = (
            layer(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        start, num_tokens = int(state["position"]), x_BTD.shape[1]
        dtype = torch.promote_types(torch.float32, q.dtype)
        if self.rope_base is not None:
            angles = rotary_angles(start, num_tokens, q.shape[-1], self.rope_base, x_BTD.device, dtype)
            q, k = rotated(q, *angles), rotated(k, *angles)
        document, place = self._counted(x_BTD, reset, state)
        if start:
            k, v = (torch.cat((state[name].to(new.dtype), new), 2) for name, new in (("key", k), ("value", v)))
        left = {
            "key": k.to(dtype),
            "value": v.to(dtype),
            "document": document,
            "place": place,
            "position": torch.tensor(start + num_tokens),
        }
        weight_BHTS = self._weights(q, k, document, place)
        y_BTD: Tensor = self.out((weight_BHTS.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return y_BTD, left

    def _counted(self, x_BTD: Tensor, reset_BT: Tensor | None, before: State) -> tuple[Tensor, Tensor]:
        """(B, S) the number of the document of each token, and its place in it, or in the row."""
        document_BT = (
            torch.zeros_like(x_BTD[..., 0], dtype=torch.int64) if reset_BT is None else reset_BT.long().cumsum(1)
        )
        place_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand_as(document_BT)
        start_BT = torch.zeros_like(document_BT)
        if reset_BT is not None and self.by == "document":
            start_BT = torch.where(reset_BT, place_BT, 0).cummax(1).values
        if before["place"].shape[1]:
            goes_on = (document_BT == 0) | (self.by == "row")
            place_BT = place_BT - start_BT + (before["place"][:, -1:] + 1) * goes_on
            document_BT = torch.cat((before["document"], before["document"][:, -1:] + document_BT), 1)
            return document_BT, torch.cat((before["place"], place_BT), 1)
        return document_BT, place_BT - start_BT

    def _weights(self, q_BHTK: Tensor, k_BHSK: Tensor, document_BS: Tensor, place_BS: Tensor) -> Tensor:
        """(B, H, T, S) what each token takes from each other one."""
        num_tokens, num_seen, size = q_BHTK.shape[2], k_BHSK.shape[2], self.block + 1
        row_S = torch.arange(num_seen, device=q_BHTK.device)
        score = q_BHTK @ k_BHSK.transpose(2, 3) / q_BHTK.shape[-1] ** 0.5
        score = score.to(torch.promote_types(torch.float32, score.dtype))
        seen_BTS = document_BS[:, -num_tokens:, None] == document_BS[:, None]
        seen_BTS = seen_BTS & (row_S <= row_S[-num_tokens:].unsqueeze(1))
        # a block begins where its count does, and where a row does
        is_first_BS = (place_BS % size == 0) | (row_S == 0)
        block_BS = is_first_BS.long().cumsum(1) - 1
        num_blocks = int(block_BS[:, -1].max()) + 1
        cell_BS = block_BS * size + place_BS % size
        token_BC = torch.full((len(cell_BS), num_blocks * size), -1, device=row_S.device)
        token_BC = token_BC.scatter(1, cell_BS, row_S.expand_as(cell_BS))
        where_C, is_there = token_BC.clamp(min=0), (token_BC >= 0)[:, None, None]
        cells = where_C[:, None, None].expand(*score.shape[:3], -1)
        score_BHTJn = score.gather(3, cells).unflatten(-1, (-1, size))
        seen_B1TJn = seen_BTS.unsqueeze(1).gather(3, cells[:, :1]) & is_there
        seen_B1TJn = seen_B1TJn.unflatten(-1, (-1, size))
        own_BT = block_BS[:, -num_tokens:]
        number_J = torch.arange(num_blocks, device=row_S.device)
        landmark_BHTJ = score_BHTJn[..., -1]
        may_follow = seen_B1TJn[..., -1] & (number_J < own_BT.unsqueeze(2)).unsqueeze(1)
        if self.top is not None and not self.training:
            may_follow = may_follow & self._among_top(landmark_BHTJ, may_follow)
        inner_BHTJn = softmax_where(score_BHTJn[..., :-1], seen_B1TJn[..., :-1])
        # the tokens of a query's own block stand beside the landmarks
        is_own = (own_BT.unsqueeze(2) == number_J)[:, None, :, :, None]
        local = (score_BHTJn[..., :-1] * is_own).sum(3)
        is_local = (seen_B1TJn[..., :-1] & is_own).any(3)
        may = torch.cat((may_follow.expand_as(landmark_BHTJ), is_local.expand_as(local)), -1)
        outer = softmax_where(torch.cat((landmark_BHTJ, local), -1), may)
        outer_BHTJ, own_BHTn = outer.split((num_blocks, self.block), -1)
        weight = inner_BHTJn * outer_BHTJ.unsqueeze(-1) + own_BHTn.unsqueeze(3) * is_own
        back = cell_BS[:, None, None].expand(*score.shape[:3], -1)
        return F.pad(weight, (0, 1)).flatten(3).gather(3, back)

    def _among_top(self, landmark_BHTJ: Tensor, may_follow: Tensor) -> Tensor:
        assert self.top is not None
        score = landmark_BHTJ.masked_fill(~may_follow, float("-inf"))
        count = min(self.top, score.shape[-1])
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count, -1).indices, True)


def softmax_where(score: Tensor, may: Tensor) -> Tensor:
    """Softmax over the last dimension among the entries that `may`; zeros where there are none."""
    weight: Tensor = score.masked_fill(~may, torch.finfo(score.dtype).min).softmax(-1) * may
    return weight
