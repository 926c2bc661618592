"""Hierarchical FFN memory beside the FFNs of a model that is there already: small MLPs fetched by the text's context.

    y = FFN(x) + sum over the path of the context of p_node mlp_node(x)

The tree, its contexts and its centroids are those of the block `hierarchical_ffn_memory` of `backbone=gpt`; its root is
the FFN. Every MLP begins without a say, so that the model answers as before. MLPs that no text of a step fetched get no
gradient at all: momentum and weight decay leave alone what they hold.

Source: Pouransari et al., "Pretraining with Hierarchical Memories", 2025 [paper abstract]: FFN memories fetched by the
cluster path of the document, added during pretraining or to a model that was trained before; in the spirit of it.
Differences: those of the block; every FFN has a tree and a path of its own.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._state import State
from cl.backbones.mixers.hierarchical_ffn_memory import HierarchicalFfnMemory as Tree
from cl.core import Batch, Output, Setting, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import TrainState
from strategies._checks import require, require_count, require_number
from strategies._modes import evaluation_mode

FFNS = ("mlp", "ffn", "feed_forward")
"""Last names of FFNs, in our blocks and in models of transformers."""
TRIED = 64
"""Tokens that the model reads once to show what its FFNs read."""


class HierarchicalFfnMemory(Strategy):
    """Give every FFN of a language model banks that are fetched by context, and train them.

    Args:
        hidden: units of each MLP.
        levels: of the tree, with the FFN as its root; 1 leaves the model as it is.
        branches: children of a node; there are branches^l of them at level l.
        block: tokens after which the context is renewed; before the first `block` of a document nothing is fetched.
        sharpness: of the weights of what is fetched.
        rate: how far a step moves a centroid towards the contexts that chose it; 0 leaves them as they were drawn.
        is_frozen: train nothing but the banks.

    Raises:
        UserError: a value outside its range, or a model without FFNs that read every token of a row at once.

    Cost: 3 D hidden (levels - 1) multiply-adds a token and FFN, 3 D hidden weights a node; no extra rows.
    """

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})
    contract = Contract(
        toy={"hidden": 4, "branches": 2, "block": 2},
        zero={"levels": 1},
        why_not_better="the rest of the toy network is trained as ever, and forgets as ever",
    )

    def __init__(
        self,
        hidden: int = 32,
        levels: int = 3,
        branches: int = 4,
        block: int = 16,
        sharpness: float = 4.0,
        rate: float = 0.05,
        is_frozen: bool = False,
    ) -> None:
        counts = {"hidden": hidden, "levels": levels, "branches": branches, "block": block}
        for name, value in counts.items():
            require_count(f"{self.name}.{name}", value)
        require_number(f"{self.name}.sharpness", sharpness, above=0)
        is_rate = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= 1
        require(is_rate, f"{self.name}.rate", rate, "a number from 0 to 1")
        require(isinstance(is_frozen, bool), f"{self.name}.is_frozen", is_frozen, "true or false")
        self.options: dict[str, Any] = {**counts, "sharpness": sharpness, "rate": rate}
        self.is_frozen = is_frozen

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        if self.options["levels"] == 1:
            return backbone
        reading, ffns = tried(backbone, info)
        if self.is_frozen:
            backbone.requires_grad_(False)
        for layer, width in ffns.items():
            bank = Bank(width, reading, **self.options)
            # half precision is for what is frozen
            layer.add_module("bank", bank.to(torch.promote_types(torch.float32, next(layer.parameters()).dtype)))
            layer.register_forward_hook(add_fetched)
        return backbone

    def on_gradients(self, state: TrainState) -> None:
        for bank in banks(state.model):
            for p in bank.parameters():
                if p.grad is not None and not p.grad.any():
                    p.grad = None

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        for bank in banks(state.model):
            bank.settle()


@dataclass
class Reading:
    """What the model reads now: shared by its embedding, which hears of it, and its banks, which need to know.

    Args:
        model: its class, for messages.
        separator: token that starts a document; None where there is none.
        tokens: (B, T) of the latest call.
    """

    model: str
    separator: int | None
    tokens: Tensor | None = None

    def require(self, is_fine: bool) -> None:
        """Raise `UserError` unless FFNs read what the embedding did."""
        if not is_fine:
            raise UserError(
                f"hierarchical_ffn_memory stands beside modules called {', '.join(FFNS)} that read all tokens of a "
                f"row, and {self.model} has none; take backbone=gpt or hf"
            )


class Bank(Tree):
    """The tree below an FFN.

    Attributes:
        left: what the training rows of this step left behind.
    """

    def __init__(self, width: int, reading: Reading, **options: Any) -> None:
        super().__init__(width, **options)
        self.nodes[0] = nn.ModuleList()
        for level in self.nodes.children():
            for node in level.children():
                nn.init.zeros_(node.get_submodule("out").weight)  # type: ignore[arg-type]
        self.reading = reading
        self.left: list[State] = []

    def root(self, x_BTD: Tensor) -> Tensor:
        """The FFN has said it."""
        return torch.zeros_like(x_BTD)

    def fetched(self, x_BTD: Tensor) -> Tensor:
        """What the context's path adds to the FFN."""
        tokens_BT, separator = self.reading.tokens, self.reading.separator
        self.reading.require(tokens_BT is not None and tokens_BT.shape == x_BTD.shape[:2])
        reset_BT = None if tokens_BT is None or separator is None else tokens_BT == separator
        y_BTD, left = self(x_BTD.to(self.centroids.dtype), reset=reset_BT)
        if self.training and torch.is_grad_enabled():
            self.left.append({name: left[name].detach() for name in ("count", "context")})
        return y_BTD

    def settle(self) -> None:
        """Move the centroids by all rows of the step, however many passes read them."""
        if self.left:
            self.commit({name: torch.cat([left[name] for left in self.left]) for name in self.left[0]})
        self.left.clear()


def add_fetched(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Forward hook: what the FFN gives, and what its bank adds; other outputs of it stay."""
    y = output[0] if isinstance(output, tuple) else output
    y = y + layer.bank.fetched(inputs[0]).to(y.dtype)  # type: ignore[operator, union-attr]
    return (y, *output[1:]) if isinstance(output, tuple) else y


def note_tokens(embedding: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward hook, before the embedding."""
    embedding.reading.tokens = inputs[0]  # type: ignore[union-attr]


def banks(model: nn.Module) -> list[Bank]:
    """Those of all FFNs."""
    return [m for m in model.modules() if isinstance(m, Bank)]


def tried(backbone: nn.Module, info: StreamInfo) -> tuple[Reading, dict[nn.Module, int]]:
    """Let a model read a few tokens, which shows its FFNs and their widths, and the embedding that hears of tokens.

    Raises:
        UserError: no FFN reads each token of a row.
    """
    reading = Reading(type(backbone).__name__, info.separator)
    named = backbone.named_modules()
    parts = [m for name, m in named if isinstance(m, nn.Embedding) or name.rpartition(".")[2] in FFNS]
    read: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[module] = inputs[0]

    handles = [m.register_forward_pre_hook(note) for m in parts]
    tokens, zero = torch.zeros(1, min(info.input_shape[0], TRIED), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode(), evaluation_mode(backbone):
        backbone(Batch(tokens, tokens, zero, zero))
    for handle in handles:
        handle.remove()
    embedding = next((m for m, x in read.items() if isinstance(m, nn.Embedding) and torch.equal(x, tokens)), None)
    ffns = {m: x.shape for m, x in read.items() if not isinstance(m, nn.Embedding)}
    reading.require(embedding is not None and bool(ffns) and all(x[:2] == tokens.shape for x in ffns.values()))
    assert embedding is not None
    embedding.reading = reading  # type: ignore[assignment]
    embedding.register_forward_pre_hook(note_tokens)
    return reading, {m: shape[-1] for m, shape in ffns.items()}
