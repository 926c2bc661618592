"""Landmark attention around a decoder: a learned token ends every block and stands for it in attention.

    e_1 .. e_n L e_n+1 .. e_2n L ...        what is read at L is dropped

Shape legend: B rows, T tokens, N tokens with the landmarks, D width, n tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.backbones._block import Auxiliary
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._segments import Slots
from cl.backbones._state import State
from cl.backbones.gpt import Gpt
from cl.core import StreamInfo


class Landmark(Gpt):
    """A decoder whose attention reaches the past through a landmark a block.

    Args:
        block: n.
        top: landmarks that a query and head may follow at evaluation; None lets them follow all.
        blocks: of the decoder, where they are others than `landmark(block=n, by=row, top=top)`, of which at least
            one should be.
        decoder: further options of `Gpt`.

    Cost: that of the decoder times 1 + 1 / n; D more weights. The state grows with the text.
    Source: Mohtashami & Jaggi, 2023 (n = 50), see `cl/backbones/mixers/landmark.py`.
    """

    toy = {"block": 2}
    lifetime = Lifetime(fast=("decoder", "tokens"), resets=())

    def __init__(
        self, info: StreamInfo, block: int = 16, top: int | None = None, blocks: str | None = None, **decoder: Any
    ) -> None:
        require_width("block", block)
        words = f"landmark(block={block}, by=row, top={'none' if top is None else top})" if blocks is None else blocks
        super().__init__(info, blocks=words, **decoder)
        self.block = block
        self.landmark = Slots(1, self.num_features)

    def init_state(self, num_rows: int) -> State:
        return super().init_state(num_rows) | {"tokens": torch.tensor(0)}

    def read(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State, Auxiliary]:
        """As `Gpt.read`, on tokens between which the landmarks are put in."""
        start = 0 if state is None else int(state["tokens"])
        num_tokens = x_BTD.shape[1]
        number_T = torch.arange(start, start + num_tokens, device=x_BTD.device)
        place_T = torch.arange(num_tokens, device=x_BTD.device) + number_T // self.block - start // self.block
        stop = start + num_tokens
        num_all = num_tokens + stop // self.block - start // self.block
        x_BND = self.landmark(len(x_BTD)).to(x_BTD.dtype).expand(-1, num_all, -1).index_copy(1, place_T, x_BTD)
        if reset is not None:
            reset = torch.zeros_like(reset[:, :1]).expand(-1, num_all).index_copy(1, place_T, reset)
        read_BND, left, auxiliary = super().read(x_BND, state, reset=reset, mode=mode)
        return read_BND[:, place_T], left | {"tokens": torch.tensor(stop)}, auxiliary
