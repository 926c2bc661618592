"""Decoder of blocks named in words: tokens, images as sequences or vectors in; each block a mixer and an MLP.

    h = E[x];  for each block: h = h + mixer(norm(h));  h = h + mlp(norm(h));  logits = head(norm(h))

Packed documents do not see each other. Source: the Llama layout (Touvron et al., 2023): RMSNorm before each part,
rotary positions, SwiGLU (Shazeer, 2020), grouped-query attention. Initial weights from a normal of deviation 0.02,
those that write into the residual stream divided by sqrt(2 * num_layers), as in GPT-2.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl.backbones._block import Auxiliary, Block, add_terms
from cl.backbones._cells import time_constants
from cl.backbones._heads import Backbone, MultiHead, require_width
from cl.backbones._lora import put_adapters
from cl.backbones._mixer import Mixer
from cl.backbones._norm import RMSNorm
from cl.backbones._reading import draw, first_layer, require_tokens, steps_of
from cl.backbones._spec import Spec, build, parse, parse_one
from cl.backbones._state import State
from cl.core import Batch, Output, Setting, StreamInfo, UserError

__all__ = ["TEXT", "Gpt", "require_tokens"]

TEXT = frozenset({Setting.CONTINUAL_PRETRAINING})
NUM_LAYERS = 3


class Gpt(Backbone):
    """Decoder over the tokens of a stream, or over images and vectors read as a sequence; then the last step predicts.

    Args:
        width: D, a multiple of twice `num_heads`.
        num_layers: blocks. A `blocks` without counts is repeated from the first block to the last until there are as
            many; one with counts, such as 3x[attention], states the depth itself, and another number is an error.
            None takes what `blocks` says, three of a single one.
        num_heads, num_kv_heads, rope_base: of mixers that take them and whose words do not say otherwise.
        mlp_width: hidden units of the MLPs; None takes 8/3 D, rounded up to a multiple of 8.
        blocks: mixers in words, such as attention, or 3x[linear_memory(rule=gated_delta)] + attention(window=64).
        mlp: swiglu, none, or moe(experts=8, top=2), in words as well.
        read: of images, rows (T = height) or pixels (T = height * width).
        dropout: of the embedding, of attention weights and of what each part adds, in training.
        is_tied: the head uses the embedding's weights; for text only.
        is_checkpointed: compute blocks again in the backward pass in place of keeping what they computed.
        lora: {rank, alpha, dropout, target_modules} trains adapters of peft in the linear layers of the blocks and
            freezes the rest; for text only. None trains all.

    Raises:
        UserError: a value outside its range, words that name nothing, or rows it cannot read.

    Cost: about 12 D^2 + 2 T D multiply-adds a token and block of attention forward, and D * vocabulary for the head;
        twice that again backward. Other mixers: see their files.
    """

    settings = frozenset(Setting)

    def __init__(
        self,
        info: StreamInfo,
        width: int = 96,
        num_layers: int | None = None,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
        blocks: str = "attention",
        mlp: str = "swiglu",
        read: str = "rows",
        rope_base: float | None = 10_000.0,
        dropout: float = 0.0,
        is_tied: bool = False,
        is_checkpointed: bool = False,
        lora: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("width", width), ("num_heads", num_heads)):
            require_width(name, value)
        for name, optional in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads), ("mlp_width", mlp_width)):
            if optional is not None:
                require_width(name, optional)
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(f"backbone.dropout is {dropout!r}; it must be a number from 0 to below 1")
        mixers, part = depth(blocks, num_layers), parse_one(mlp, "backbone.mlp")
        super().__init__(info, width)
        self.is_text = info.setting in TEXT
        if is_tied and not self.is_text:
            raise UserError("backbone.is_tied is true; it must be false where rows are no tokens")
        self.separator, self.read_images_by, self.is_checkpointed = info.separator, read, is_checkpointed
        self.embedding = first_layer(info, width, read, "gpt")
        self.dropout = nn.Dropout(dropout)
        shared: dict[str, Any] = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "rope_base": rope_base,
            "dropout": dropout,
        }
        self.blocks = nn.ModuleList(
            Block(
                width, build(spec, "mixers", "backbone.blocks", width, **shared), _mlp(part, width, mlp_width), dropout
            )
            for spec in mixers
        )
        self.norm = RMSNorm(width, eps=1e-6)
        draw(self.blocks, len(self.blocks))
        if self.is_text:
            self.head = nn.Linear(width, info.num_outputs, bias=False)
            draw(nn.ModuleList((self.embedding, self.head)), 1)
        if is_tied:
            self.head.weight = self.embedding.weight
        if lora is not None:
            if not self.is_text:
                raise UserError("backbone.lora freezes the head; it must be null where rows are no tokens")
            put_adapters(self, lora)

    # the parts, for what is built around a decoder

    def resets(self, inputs: Tensor) -> Tensor | None:
        """(B, T) True where a document starts; None for rows without separators."""
        return inputs == self.separator if self.is_text and self.separator is not None else None

    def embed(self, inputs: Tensor) -> Tensor:
        """(B, T, D) of tokens (B, T), images or vectors."""
        x_BTD: Tensor = self.dropout(self.embedding(inputs if self.is_text else steps_of(inputs, self.read_images_by)))
        return x_BTD

    def init_state(self, num_rows: int) -> State:
        """What is remembered before the first token: by number of the block."""
        return {str(number): cast(Mixer, block.mixer).init_state(num_rows) for number, block in enumerate(self.blocks)}

    def read(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State, Auxiliary]:
        """Blocks and the last norm, on embedded tokens.

        Returns:
            (B, T, D) what the head reads, the state to hand on, and the terms that blocks add to the loss.
        """
        left: State = {}
        auxiliary: Auxiliary = {}
        is_recomputed = self.is_checkpointed and self.training and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            before = None if state is None else state[str(number)]
            if is_recomputed:
                x_BTD, own, terms = checkpoint(block, x_BTD, before, reset, mode, use_reentrant=False)
            else:
                x_BTD, own, terms = block(x_BTD, before, reset, mode)
            left[str(number)] = own
            add_terms(auxiliary, terms)
        return self.norm(x_BTD), left, auxiliary

    def predict(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Logits of what `hidden_of` gave."""
        logits: Tensor = self.head(hidden, batch.task_id) if isinstance(self.head, MultiHead) else self.head(hidden)
        return logits

    def hidden_of(self, read_BTD: Tensor) -> Tensor:
        """What the head reads: every token of a text, the last step of anything else."""
        return read_BTD if self.is_text else read_BTD[:, -1]

    # as a backbone

    def features(self, inputs: Tensor) -> Tensor:
        return self.hidden_of(self.read(self.embed(inputs), reset=self.resets(inputs))[0])

    def forward(self, batch: Batch, start: int = 0) -> Output:
        if start or self.between:
            return super().forward(batch, start)
        output = self.step(batch)
        return output if self.commits else Output(output.logits, output.hidden, auxiliary=output.auxiliary)

    def step(self, batch: Batch, state: State | None = None, mode: str = "chunk") -> Output:
        """Read some more of each row, after what `state` remembers; `Output.state` is what to hand on.

        Any division of a text into steps gives the logits of the whole. Rows that are no text predict after each
        piece.
        """
        read_BTD, left, auxiliary = self.read(
            self.embed(batch.inputs), state, reset=self.resets(batch.inputs), mode=mode
        )
        hidden = self.hidden_of(read_BTD)
        return Output(self.predict(hidden, batch), hidden, state=left, auxiliary=auxiliary)

    def traces(self) -> Mapping[str, Tensor]:
        return time_constants(self)

    @property
    def commits(self) -> bool:
        return any(cast(Mixer, block.mixer).commits for block in self.blocks)

    def commit(self, batch: Batch, output: Output) -> None:
        for number, block in enumerate(self.blocks):
            cast(Mixer, block.mixer).commit(output.state[str(number)])


def depth(blocks: str, num_layers: int | None) -> Sequence[Spec]:
    """One spec per block of the decoder.

    Raises:
        UserError: `num_layers` contradicts the words.

    Example:
        >>> [spec.name for spec in depth("attention", 2)], len(depth("2x[attention] + attention", None))
        (['attention', 'attention'], 3)
    """
    found = parse(blocks)
    specs = found.specs
    if num_layers is None:
        return specs * NUM_LAYERS if len(specs) == 1 and not found.is_counted else specs
    if num_layers < len(specs) or (found.is_counted and num_layers != len(specs)):
        raise UserError(
            f"backbone.num_layers is {num_layers}, but backbone.blocks={blocks} names {len(specs)} blocks; leave "
            "num_layers out, or make them agree"
        )
    return [specs[number % len(specs)] for number in range(num_layers)]


def _mlp(spec: Spec, width: int, hidden: int | None) -> nn.Module | None:
    if spec.name == "none":
        return None
    options: dict[str, Any] = {} if hidden is None else {"hidden": hidden}
    return build(spec, "mlps", "backbone.mlp", width, **options)
