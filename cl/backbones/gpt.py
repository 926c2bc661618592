"""Decoder for text: embedding, blocks of a mixer and a gated MLP, head; packed documents do not see each other.

    h = E[x];  for each block: h = h + mixer(norm(h));  n = norm(h);  h = h + W_out (silu(W_gate n) * W_up n)
    logits = head(norm(h))

Source: the Llama layout (Touvron et al., 2023): RMSNorm before each part, rotary positions, SwiGLU (Shazeer, 2020),
grouped-query attention. Initial weights from a normal of deviation 0.02, those that write into the residual stream
divided by sqrt(2 * num_layers), as in GPT-2.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl.backbones._heads import Backbone, require_width
from cl.backbones._mixers import State, make_mixer
from cl.core import Batch, Output, Setting, StreamInfo, UserError

SETTINGS = frozenset({Setting.CONTINUAL_PRETRAINING})


class Mlp(nn.Module):
    """SwiGLU: W_out (silu(W_gate x) * W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.out(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return y_BTD


class Block(nn.Module):
    """A mixer and an MLP, each behind a norm and added to what it read."""

    def __init__(self, width: int, mixer: nn.Module, mlp: nn.Module, dropout: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width, eps=1e-6), mixer
        self.mlp_norm, self.mlp = nn.RMSNorm(width, eps=1e-6), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, reset_BT: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        mixed_BTD, left = self.mixer(self.mixer_norm(x_BTD), reset_BT, state)
        x_BTD = x_BTD + self.dropout(mixed_BTD)
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD))), left


class Gpt(Backbone):
    """Decoder over the tokens of a stream.

    Args:
        width: D, a multiple of twice `num_heads`.
        num_layers: blocks.
        num_heads, num_kv_heads: of attention; None gives every head its own keys and values.
        mlp_width: hidden units of the MLPs; None takes 8/3 D, rounded up to a multiple of 8.
        mixers: name of the mixer of all blocks, or a list that is repeated from the first block to the last.
        mixer_options: further arguments of the mixers, by their names.
        rope_base: of the rotary angles.
        dropout: of the embedding, of attention weights and of what each part adds, in training.
        is_tied: the head uses the embedding's weights.
        is_checkpointed: compute blocks again in the backward pass in place of keeping what they computed.

    Raises:
        UserError: a value outside its range, or rows that are no tokens.

    Cost: about 12 D^2 + 2 T D multiply-adds a token and block forward, and D * vocabulary for the head; twice that
        again backward.
    """

    settings = SETTINGS

    def __init__(
        self,
        info: StreamInfo,
        width: int = 96,
        num_layers: int = 3,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
        mixers: str | Sequence[str] = "attention",
        mixer_options: dict[str, Any] | None = None,
        rope_base: float = 10_000.0,
        dropout: float = 0.0,
        is_tied: bool = False,
        is_checkpointed: bool = False,
    ) -> None:
        require_tokens(info, "gpt")
        for name, value in (("width", width), ("num_layers", num_layers), ("num_heads", num_heads)):
            require_width(name, value)
        for name, optional in (("num_kv_heads", num_kv_heads), ("mlp_width", mlp_width)):
            if optional is not None:
                require_width(name, optional)
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(f"backbone.dropout is {dropout!r}; it must be a number from 0 to below 1")
        if not isinstance(rope_base, int | float) or not rope_base > 1:
            raise UserError(f"backbone.rope_base is {rope_base!r}; it must be a number above 1")
        names = [mixers] if isinstance(mixers, str) else list(mixers)
        if not names:
            raise UserError("backbone.mixers is empty; it must name at least one, such as attention")
        super().__init__(info, width)
        self.separator, self.is_checkpointed = info.separator, is_checkpointed
        mlp_width = mlp_width or -(-8 * width // 24) * 8
        own = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "rope_base": rope_base, "dropout": dropout}
        options = {name: own if name == "attention" else {"num_heads": num_heads} for name in names}
        self.embedding = nn.Embedding(info.num_outputs, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                width, self._mixer(name, width, options[name] | (mixer_options or {})), Mlp(width, mlp_width), dropout
            )
            for name in (names[layer % len(names)] for layer in range(num_layers))
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, info.num_outputs, bias=False)
        self.apply(partial(_draw, deviation=0.02))
        for name, p in self.named_parameters():
            if name.endswith(".out.weight"):
                nn.init.normal_(p, std=0.02 / (2 * num_layers) ** 0.5)
        if is_tied:
            self.head.weight = self.embedding.weight

    @staticmethod
    def _mixer(name: str, width: int, options: dict[str, Any]) -> nn.Module:
        try:
            return make_mixer(name, width=width, **options)
        except TypeError as error:
            raise UserError(f"backbone.mixer_options do not fit the mixer {name}: {error}") from None

    def reset(self, tokens_BT: Tensor) -> Tensor | None:
        """(B, T) True where a document starts; None for a stream without separators."""
        return None if self.separator is None else tokens_BT == self.separator

    def features(self, inputs: Tensor) -> Tensor:
        return self._read(inputs, None)[0]

    def _read(self, tokens_BT: Tensor, states: Sequence[State] | None) -> tuple[Tensor, list[State]]:
        reset_BT = self.reset(tokens_BT)
        hidden_BTD = self.dropout(self.embedding(tokens_BT))
        left = []
        is_recomputed = self.is_checkpointed and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            state = None if states is None else states[layer]
            if is_recomputed:
                hidden_BTD, own = checkpoint(block, hidden_BTD, reset_BT, state, use_reentrant=False)
            else:
                hidden_BTD, own = block(hidden_BTD, reset_BT, state)
            left.append(own)
        return self.norm(hidden_BTD), left

    def step(self, batch: Batch, state: Sequence[State] | None = None) -> Output:
        """Read some more tokens of each row, after what `state` remembers; `Output.state` is what to hand on.

        Any division of a text into steps gives the logits of the whole.
        """
        hidden_BTD, left = self._read(batch.inputs, state)
        return Output(self.head(hidden_BTD), hidden_BTD, state=left)


def _draw(module: nn.Module, deviation: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def require_tokens(info: StreamInfo, backbone: str) -> None:
    """Whether rows are text.

    Raises:
        UserError: they are not.
    """
    if info.setting != Setting.CONTINUAL_PRETRAINING or len(info.input_shape) != 1:
        raise UserError(
            f"backbone {backbone} reads rows of tokens, such as those of stream=builtin_text; the rows of {info.name} "
            f"have the shape {tuple(info.input_shape)} in the {info.setting} setting"
        )
