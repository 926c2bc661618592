"""Block-Recurrent Transformer: one block exchanges with state vectors, which a gate carries from segment to segment.

    x   <- x + W_o attend(norm x -> n S)                                   before block l; n S = norm(S) + positions
    z    = W_z [attend(n S -> n S) ; attend(n S -> norm x)]                once a segment
    S   <- g S + (1 - g) z,   g = sigmoid(b), learned, one number a channel

Tokens also see a window of tokens that goes on over the borders: attention with a window, whose state is carried.

Shape legend: B rows, T tokens, D width, n state vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._block import Auxiliary
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._norm import RMSNorm
from cl.backbones._reading import draw
from cl.backbones._segments import CrossAttention, Segment, Segmented, Slots, kept
from cl.backbones._state import State
from cl.backbones.gpt import Gpt
from cl.core import StreamInfo, UserError


class BlockRecurrent(Segmented):
    """State vectors beside one block of a decoder.

    Args:
        segment: T, tokens of a segment.
        num_states: n.
        layer: l, number of the block from 0; None takes the one five sixths up.
        gate: initial b; 1 keeps about three quarters of a state in each segment.
        blocks: of the decoder; the window should be a segment or more.
        num_heads: of the decoder and of the exchange.
        truncate: k, segments after which all that is carried is detached; None never does.
        is_replayed: keep memories at the borders only, and read segments again in the backward pass.
        decoder: further options of `Gpt`.

    Raises:
        UserError: a value outside its range.

    Cost: 14 D^2 more weights; 4 D^2 + 2 n D more multiply-adds a token; the state holds n D numbers beside a window.
    Source: Hutchins et al., "Block-Recurrent Transformers", 2022, in the spirit of the code in google-research/meliad
        (transformer/configs/recurrent/bias_skip.gin): fixed gate, state positions after the norm, one recurrent block
        late in the stack, the tenth of twelve there, with 512 states and a window of 512. Differences: the block's own
        attention stays as it is and the exchange is added before it, so that any block of any decoder can be the one;
        keys and values are not shared between the directions, and not normalised; states look at the segment alone,
        and not at the window before it too; b starts at 1, and not near 0.
    """

    toy = {"segment": 4, "num_states": 3, "blocks": "attention(window=4)"}
    lifetime = Lifetime(fast=("states", "decoder"), resets=("states",))

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        num_states: int = 16,
        layer: int | None = None,
        gate: float = 1.0,
        blocks: str = "attention(window=32)",
        num_heads: int = 4,
        truncate: int | None = None,
        is_replayed: bool = False,
        **decoder: Any,
    ) -> None:
        require_width("num_states", num_states)
        if isinstance(gate, bool) or not isinstance(gate, int | float):
            raise UserError(f"backbone.gate is {gate!r}; it must be a number")
        super().__init__(info, segment, truncate, is_replayed, blocks=blocks, num_heads=num_heads, **decoder)
        count, width = len(self.blocks), self.num_features
        if layer is not None and (not isinstance(layer, int) or not 0 <= layer < count):
            raise UserError(f"backbone.layer is {layer!r}; it must be the number of a block, 0 to {count - 1}")
        self.layer = count * 5 // 6 if layer is None else layer
        self.states, self.places = Slots(num_states, width, 0.1), Slots(num_states, width, 1.0)
        self.state_norm = RMSNorm(width, eps=1e-6)
        self.to_tokens = CrossAttention(width, num_heads)
        self.to_states = CrossAttention(width, num_heads, has_norm=False)
        self.among_states = CrossAttention(width, num_heads, has_norm=False)
        self.mix = nn.Linear(2 * width, width, bias=False)
        draw(nn.ModuleList((self.to_tokens, self.to_states, self.among_states, self.mix)), count)
        self.keep = Keep(width, float(gate))

    def fresh_memory(self, num_rows: int) -> State:
        return {"states": self.states(num_rows), "decoder": Gpt.init_state(self, num_rows)}

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        total, x_BTD = Auxiliary(), part.x
        after: State = {"states": memory["states"], "decoder": {}}
        for number in range(len(self.blocks)):
            if number == self.layer:
                states_BnD = memory["states"]
                placed_BnD = self._placed(states_BnD)
                if part.is_whole:
                    after["states"] = self._written(part, states_BnD, self.to_tokens.norm(x_BTD))
                read_BTD, _ = self.to_tokens(x_BTD, placed_BnD.to(x_BTD.dtype))
                x_BTD = x_BTD + read_BTD * part.continues.unsqueeze(2)
            before, reset = memory["decoder"][str(number)], part.carried_reset
            x_BTD, after["decoder"][str(number)] = self.through(number, x_BTD, before, reset, part.mode, total)
        return self.norm(x_BTD), after, total

    def _placed(self, states_BnD: Tensor) -> Tensor:
        return self.state_norm(states_BnD) + self.places(1)

    def _written(self, part: Segment, states_BnD: Tensor, tokens_BTD: Tensor) -> Tensor:
        """The states after the segment; a document that begins inside it starts from fresh ones."""
        states_BnD = torch.where(part.is_left.view(-1, 1, 1), self.states(len(states_BnD)), states_BnD)
        placed_BnD = self._placed(states_BnD).to(tokens_BTD.dtype)
        own_BnD, _ = self.among_states(placed_BnD, placed_BnD)
        seen_BnD, _ = self.to_states(placed_BnD, tokens_BTD, part.is_last[:, None, None])
        z_BnD = kept(self.mix(torch.cat((own_BnD, seen_BnD), 2)))
        keep_D = self.keep()
        return keep_D * states_BnD + (1 - keep_D) * z_BnD


class Keep(nn.Module):
    """g = sigmoid(b), one number a channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((width,), value))

    def forward(self) -> Tensor:
        return kept(self.bias).sigmoid()
