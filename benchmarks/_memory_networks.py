"""The decoders that `memory_speed.py` measures: blocks of one kind, memories of segments, and layers of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from _fit import active_weights, fitted_width
from _fla_layers import LAYERS, around
from torch import nn

from cl.backbones.armt import Armt
from cl.backbones.block_recurrent import BlockRecurrent
from cl.backbones.gated_fifo import GatedFifo
from cl.backbones.gpt import Gpt
from cl.backbones.hmt import Hmt
from cl.backbones.landmark import Landmark
from cl.backbones.memformer import Memformer
from cl.backbones.memoria import Memoria
from cl.backbones.rmt import Rmt
from cl.backbones.trc2 import Trc2
from cl.core import Setting, StreamInfo

VOCABULARY = 256
BLOCKS: Mapping[str, str] = {
    "attention": "attention",
    "window": "attention(window=64)",
    "linear": "linear_memory(rule=linear)",
    "retnet": "linear_memory(rule=retnet)",
    "gla": "linear_memory(rule=gla)",
    "mamba2": "linear_memory(rule=mamba2)",
    "mlstm": "linear_memory(rule=mlstm)",
    "delta": "linear_memory(rule=delta)",
    "gated_delta": "linear_memory(rule=gated_delta)",
    "kda": "linear_memory(rule=kda)",
    "gateloop": "linear_memory(rule=gateloop)",
    "longhorn": "linear_memory(rule=longhorn)",
    "ridge": "ridge_memory",
    "ridge, 20 steps": "ridge_memory(steps=20)",
    "ttt_linear": "neural_memory(rule=ttt_linear)",
    "titans": "neural_memory(rule=titans)",
    "titans, a matrix": "neural_memory(rule=titans(depth=1))",
    "titans as context": "neural_memory(rule=titans, layout=mac)",
    "titans as gate": "neural_memory(rule=titans, layout=mag)",
    "titans as layer": "neural_memory(rule=titans, layout=mal)",
    **{name: f"neural_memory(rule={name})" for name in ("ttt_mlp", "atlas", "moneta", "yaad", "memora", "tnt")},
    "min_gru": "scan_rnn",
    "min_lstm": "scan_rnn(cell=minlstm)",
    **{name: f"scan_rnn(cell={name})" for name in ("lru", "s5", "hippo", "ffm", "leaky")},
    "gru": "nonlinear_rnn",
    **{name: f"nonlinear_rnn(cell={name})" for name in ("lstm", "slstm", "lem", "bilinear", "m2rnn", "leaky_tau")},
    "hierarchical_ffn": "hierarchical_ffn_memory(hidden=16)",
    "hippocampus": "hippocampus",
    "memory_cache": "memory_cache(linear_memory)",
    "mixture_of_memories": "mixture_of_memories(linear_memory)",
    # longer pieces than the defaults, which are those of short texts
    "ttt_linear, chunks of 64": "neural_memory(rule=ttt_linear(chunk=64))",
    "titans, chunks of 256": "neural_memory(rule=titans(chunk=256))",
    "titans, expansion 1, chunks of 256": "neural_memory(rule=titans(expansion=1, chunk=256))",
    "titans, a matrix, chunks of 256": "neural_memory(rule=titans(depth=1, chunk=256))",
    "memory_cache, segments of 512": "memory_cache(linear_memory, segment=512)",
}
SEGMENTS = {
    "rmt": Rmt,
    "armt": Armt,
    "hmt": Hmt,
    "block_recurrent": BlockRecurrent,
    "memformer": Memformer,
    "gated_fifo": GatedFifo,
    "memoria": Memoria,
}
DECODERS: Mapping[str, Callable[..., nn.Module]] = {
    "hope": partial(Gpt, blocks="self_modifying", mlp="cms"),
    "trc2": Trc2,
    "landmark": Landmark,
    **SEGMENTS,
    **{f"{name}, segments of 512": partial(kind, segment=512) for name, kind in SEGMENTS.items()},
    "memformer, segments of 512, not replayed": partial(Memformer, segment=512, is_replayed=False),
}
"""What is more than blocks of one kind."""
NAMES = (*BLOCKS, *DECODERS)


def decoder(name: str, **sizes: Any) -> Callable[..., nn.Module]:
    """What makes a decoder with blocks of one kind, or with the layer of somebody else that `theirs` names."""
    if name in LAYERS:
        return partial(around, name, **sizes)
    return partial(DECODERS[name] if name in DECODERS else partial(Gpt, blocks=BLOCKS[name]), **sizes)


def equal(name: str, target: int, info: StreamInfo, **sizes: Any) -> Callable[..., nn.Module]:
    """The decoder whose hidden width brings its weights nearest to `target`; gated_fifo alone has 6 % more.

    Raises:
        ValueError: as `fitted_width`.
    """
    made = decoder(name, **sizes)
    width = fitted_width(lambda hidden: counted(partial(made, mlp_width=hidden), info), target, 2, name, 0.06)
    return partial(made, mlp_width=width)


def counted(made: Callable[..., nn.Module], info: StreamInfo) -> int:
    """Active weights of a network that is only counted: nothing is drawn."""
    with torch.device("meta"):
        return active_weights(made(info))


def text(tokens: int) -> StreamInfo:
    """Rows of bytes."""
    return StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (tokens,), VOCABULARY, 1, measure="loss")
