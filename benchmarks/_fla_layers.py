"""Layers of flash-linear-attention in our decoder, beside those of ours that have the same recurrence.

They are given what ours have: keys and values of D / H for each head, a short convolution over four tokens and an
output gate, where theirs have such a thing at all (LinearAttention has neither). Mamba-2 stands beside their
SimpleGatedLinearAttention, the same scalar decay in Triton, since their Mamba2 is plain torch without mamba-ssm; ridge
beside MesaNet, the same ridge regression by conjugate gradients, since there is no Gated KalmaNet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from cl.backbones._mixer import Lifetime, Mixer
from cl.backbones._state import State
from cl.backbones.gpt import Gpt
from cl.core import StreamInfo

Options = Callable[[int, int], dict[str, Any]]
"""Of a layer, by D and H."""


def _by_expansion(**more: Any) -> Options:
    return lambda width, heads: {"num_heads": heads, "expand_k": 1.0, "expand_v": 1.0, **more}


def _by_head(**more: Any) -> Options:
    return lambda width, heads: {"num_heads": heads, "head_dim": width // heads, **more}


# ours -> where theirs is, and its options
_THEIRS: Mapping[str, tuple[str, str, Options]] = {
    "linear": (
        "fla.layers.linear_attn",
        "LinearAttention",
        _by_expansion(feature_map="elu", do_feature_map_norm=True),
    ),
    "retnet": ("fla.layers.multiscale_retention", "MultiScaleRetention", _by_expansion(use_short_conv=True)),
    "gla": ("fla.layers.gla", "GatedLinearAttention", _by_expansion(use_short_conv=True)),
    "mamba2": ("fla.layers.simple_gla", "SimpleGatedLinearAttention", _by_expansion(use_short_conv=True)),
    "delta": ("fla.layers.delta_net", "DeltaNet", _by_expansion(use_gate=True)),
    "gated_delta": ("fla.layers.gated_deltanet", "GatedDeltaNet", _by_head(expand_v=1)),
    "kda": ("fla.layers.kda", "KimiDeltaAttention", _by_head(expand_v=1)),
    "ridge": ("fla.layers.mesa_net", "MesaNet", _by_head(use_output_gate=True)),
    "mixture_of_memories": ("fla.layers.mom", "MomAttention", _by_head(expand_v=1, num_memories=4, topk=2)),
}
LAYERS = {f"fla {_THEIRS[name][1]}": name for name in _THEIRS}
"""What a row of theirs is called, and the block of ours that it stands beside."""


def theirs(name: str) -> str | None:
    """Name of the row beside a block of ours."""
    return next((row for row, ours in LAYERS.items() if ours == name), None)


def absence(row: str) -> str:
    """Why a layer cannot be had, in one sentence; empty where it can."""
    module, layer, _ = _THEIRS[LAYERS[row]]
    try:
        getattr(import_module(module), layer)
    except Exception as error:  # a peer broken by its own imports is an absent peer
        return f"{row} is left out: {type(error).__name__}: {error}"
    return ""


class Theirs(Mixer):
    """Somebody's layer as a mixer: rows are read from their start, and nothing is remembered after them."""

    lifetime = Lifetime(fast=())

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def init_state(self, num_rows: int) -> State:
        return {}

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        assert reset is None, "rows of one document each"
        y_BTD: Tensor = self.layer(x_BTD)[0]
        return y_BTD, {}


def around(row: str, info: StreamInfo, **sizes: Any) -> Gpt:
    """Our decoder with their layers in the place of attention."""
    module, name, options = _THEIRS[LAYERS[row]]
    layer, made = getattr(import_module(module), name), Gpt(info, blocks="attention", **sizes)
    width, heads = sizes["width"], sizes["num_heads"]
    for number, block in enumerate(made.blocks):
        # their layers ask for their number, which caches of generation are kept by
        block.mixer = Theirs(layer(hidden_size=width, layer_idx=number, **options(width, heads)))
    return made
