"""Runs of the probe study: its memories, its probes, and what each memory is given to be of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from _fit import active_weights, fitted_width
from _study import Study, run_to_the_end
from torch import nn

from cl.backbones.armt import Armt
from cl.backbones.gpt import Gpt
from cl.backbones.rmt import Rmt
from cl.core import Batch, Setting, StreamInfo
from cl.result import Result
from cl.state import tensor_bytes

WIDTH, LAYERS, HEADS, BATCH, SEGMENT = 48, 2, 4, 32, 16
SIZES = (4096, 16384)
"""Bytes of state after a row, of all blocks together."""


@dataclass(frozen=True)
class Memory:
    """A backbone, and what sets the size of its state.

    Args:
        backbone: name of its config.
        option: of the decoder, with {n} for the size; empty where the backbone has one form only.
        sizes: to choose from.
    """

    backbone: str
    option: str = ""
    sizes: Sequence[int] = (0,)


WIDTHS = (4, 6, 8, 12, 16, 20, 24, 32)
UNITS = (16, 32, 48, 64, 96, 128, 192)
MEMORIES: Mapping[str, Memory] = {
    "attention": Memory("gpt"),
    "window": Memory("gpt", "blocks=attention(window={n})", (4, 6, 8, 12, 16, 22, 32)),
    "linear": Memory("gpt", "blocks=linear_memory(rule=linear, key_width={n}, value_width={n})", WIDTHS),
    "mamba2": Memory("gpt", "blocks=linear_memory(rule=mamba2, key_width={n}, value_width={n})", WIDTHS),
    "delta": Memory("gpt", "blocks=linear_memory(rule=delta, key_width={n}, value_width={n})", WIDTHS),
    "delta, beta to 2": Memory(
        "gpt", "blocks=linear_memory(rule=delta(negative=true), key_width={n}, value_width={n})", WIDTHS
    ),
    "gated_delta": Memory("gpt", "blocks=linear_memory(rule=gated_delta, key_width={n}, value_width={n})", WIDTHS),
    "ridge": Memory("gpt", "blocks=ridge_memory(head={n})", WIDTHS),
    "titans, a matrix": Memory("gpt", "blocks=neural_memory(rule=titans(depth=1, chunk={n}))", (4,)),
    "min_gru": Memory("gpt", "blocks=scan_rnn(units={n})", UNITS),
    "lru": Memory("gpt", "blocks=scan_rnn(cell=lru, units={n})", UNITS),
    "gru": Memory("gpt", "blocks=nonlinear_rnn(units={n})", UNITS),
    "slstm": Memory("gpt", "blocks=nonlinear_rnn(cell=slstm, units={n})", UNITS),
    "rmt": Memory("rmt", "num_memory={n}", (2, 4, 8, 16, 32)),
    "armt": Memory("armt", "memory_width={n}", (1, 2, 4, 8, 16)),
}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A stream, and how long networks are trained on it.

    Args:
        stream: its name below streams/probes.
        words: of the request.
        outputs: that a token may have.
        length: of a row in training.
        sizes: of the state, in bytes, that are asked.
        rate: of AdamW.
        steps: of a run.
    """

    stream: str
    words: Sequence[str]
    outputs: int
    length: int
    sizes: Sequence[int] = SIZES
    rate: float = 0.003
    steps: int = 1500


TRACKED = ("stream.lengths=[16]", "stream.test_lengths=[32,64]", "stream.train_rows=100000")
MQAR = Probe(
    stream="mqar",
    words=("stream.train=[[32,4,100000]]", "stream.test=[[32,8],[64,8],[64,16]]", "stream.vocabulary=64"),
    outputs=64,
    length=32,
)
PROBES: Mapping[str, Probe] = {
    "mqar": MQAR,
    # some memories learn it at the one rate only, some at the other
    "mqar_slow": replace(MQAR, rate=0.001, steps=3000),
    "selective_copying": Probe(
        stream="selective_copying",
        words=(
            *("stream.lengths=[24]", "stream.test_lengths=[48,96]"),
            *("stream.tokens=6", "stream.symbols=8", "stream.train_rows=100000"),
        ),
        outputs=10,
        length=30,
    ),
    "parity": Probe(stream="parity", words=TRACKED, outputs=2, length=16, sizes=SIZES[:1]),
    "s5": Probe(stream="s5", words=("stream.letters=swaps", *TRACKED), outputs=120, length=16, sizes=SIZES[:1]),
}
QUICK = ("trainer.eval_rows=16", "trainer.max_steps=20")


def built(probe: str, memory: Memory, size: int, hidden: int | None = None) -> nn.Module:
    """The backbone as the probe's rows will find it."""
    rows = PROBES[probe]
    info = StreamInfo(probe, Setting.CONTINUAL_PRETRAINING, (rows.length,), rows.outputs, 1, measure="accuracy")
    name, _, value = memory.option.format(n=size).partition("=")
    chosen = {name: int(value) if value.isdigit() else value} if name else {}
    segment = {} if memory.backbone == "gpt" else {"segment": SEGMENT}
    kind = {"gpt": Gpt, "rmt": Rmt, "armt": Armt}[memory.backbone]
    return kind(info, width=WIDTH, num_layers=LAYERS, num_heads=HEADS, mlp_width=hidden, **segment, **chosen)


def state_bytes(model: nn.Module, length: int) -> int:
    """What a row leaves behind; of an unfinished segment only the memory, which is what a longer row needs."""
    tokens, zero = torch.zeros(1, length // SEGMENT * SEGMENT, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        return tensor_bytes(model.eval().step(Batch(tokens, tokens, zero, zero)).state)


@lru_cache(maxsize=256)
def chosen(probe: str, name: str, target: int) -> tuple[int, int, int]:
    """Size, hidden width and bytes of state of a memory: the nearest to `target` that leaves room for equal weights."""
    memory = MEMORIES[name]
    weights = active_weights(built(probe, MEMORIES["attention"], 0))
    found = {size: state_bytes(built(probe, memory, size), PROBES[probe].length) for size in memory.sizes}
    for size in sorted(found, key=lambda size: abs(found[size] - target)):
        try:
            width = fitted_width(lambda w, s=size: active_weights(built(probe, memory, s, w)), weights, 2, name)
        except ValueError:
            continue
        return size, width, found[size]
    raise ValueError(f"{name} has no size with {weights:,} weights")


@dataclass(frozen=True, kw_only=True)
class Probes(Study):
    """The runs of the study."""

    out: Path = Path("runs/probes")
    page: Path = Path("docs/comparisons/probes")
    seeds: int = 1
    is_quick: bool = False

    def plan(self, probes: Sequence[str], names: Sequence[str]) -> list[tuple[str, str, int]]:
        """(probe, backbone, bytes that are wanted); a backbone without a choice, or with one result, comes once."""
        found = {}
        for probe in probes:
            for name in names:
                for target in PROBES[probe].sizes:
                    found.setdefault((probe, name, chosen(probe, name, target)[0]), (probe, name, target))
        return list(found.values())

    def folder(self, probe: str, name: str, target: int, seed: int) -> Path:
        return self.out / probe / f"{name.replace(', ', '-').replace(' ', '_')}-{target}" / f"seed-{seed}"

    def run(self, probe: str, name: str, target: int, seed: int) -> None:
        """One `cl run`."""
        memory, (size, hidden, _) = MEMORIES[name], chosen(probe, name, target)
        option, _, value = memory.option.format(n=size).partition("=")
        options = [f"backbone.width={WIDTH}", f"backbone.num_layers={LAYERS}", f"backbone.mlp_width={hidden}"]
        if option:
            options.append(f"backbone.{option}='{value}'" if option == "blocks" else f"backbone.{option}={value}")
        if memory.backbone != "gpt":
            options.append(f"backbone.segment={SEGMENT}")
        asked = PROBES[probe]
        words = [f"stream=probes/{asked.stream}", f"backbone={memory.backbone}", *asked.words, *options]
        words += ["optimizer=adamw", f"optimizer.lr={asked.rate}", "trainer.clip_norm=1.0"]
        words += [f"trainer.batch_size={BATCH}", *(QUICK if self.is_quick else [f"trainer.max_steps={asked.steps}"])]
        words += ["tracking=none", f"seed={seed}"]
        run_to_the_end(self.folder(probe, name, target, seed), words)

    def results(self, probe: str, name: str, target: int) -> list[Result]:
        """Finished runs."""
        paths = [self.folder(probe, name, target, seed) / "result.json" for seed in range(self.seeds)]
        return [run for run in map(Result.load, filter(Path.is_file, paths)) if run.status == "done"]
