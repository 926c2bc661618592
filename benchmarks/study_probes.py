"""The probe study: what each memory holds, at equal weights and, where it has a choice, at equal bytes of state.

    python benchmarks/study_probes.py [--out runs/probes] [--page FOLDER] [--seeds 1] [--steps 1500] [--quick]

Every backbone has two blocks, the same width and, by its hidden width, as many weights as the transformer (within 3 %).
Recall (`mqar`) and selective copying are asked at two sizes of state: an option of each memory is chosen so that a row
leaves about so many bytes behind, or as near as its weights allow. State tracking (`parity`, `s5`) depends on what the
state can do and not on its size, and is asked at the smaller one. Rows are trained at one length and measured at longer
ones and with more to hold. 250 steps were tried first, and no memory had learnt mqar by then. Every run is a `cl run`,
and the same command goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median

import torch
from _families import family
from _fit import active_weights, fitted_width
from _study import Study, run_to_the_end, table
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
TRACKING = ("parity", "s5")
PROBES: Mapping[str, Sequence[str]] = {
    "mqar": ("stream.train=[[32,4,100000]]", "stream.test=[[32,8],[64,8],[64,16]]", "stream.vocabulary=64"),
    "selective_copying": (
        *("stream.lengths=[24]", "stream.test_lengths=[48,96]"),
        *("stream.tokens=6", "stream.symbols=8", "stream.train_rows=100000"),
    ),
    "parity": ("stream.lengths=[16]", "stream.test_lengths=[32,64]", "stream.train_rows=100000"),
    "s5": (
        "stream.letters=swaps",
        *("stream.lengths=[16]", "stream.test_lengths=[32,64]", "stream.train_rows=100000"),
    ),
}
OUTPUTS = {"mqar": 64, "selective_copying": 10, "parity": 2, "s5": 120}
LENGTH = {"mqar": 32, "selective_copying": 30, "parity": 16, "s5": 16}
FIGURE = "accuracy_by_state.png"
QUICK = ("trainer.eval_rows=16",)


def built(probe: str, memory: Memory, size: int, hidden: int | None = None) -> nn.Module:
    """The backbone as the probe's rows will find it."""
    info = StreamInfo(probe, Setting.CONTINUAL_PRETRAINING, (LENGTH[probe],), OUTPUTS[probe], 1, measure="accuracy")
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
    found = {size: state_bytes(built(probe, memory, size), LENGTH[probe]) for size in memory.sizes}
    for size in sorted(found, key=lambda size: abs(found[size] - target)):
        try:
            width = fitted_width(lambda w, s=size: active_weights(built(probe, memory, s, w)), weights, 2, name)
        except ValueError:
            continue
        return size, width, found[size]
    raise ValueError(f"{name} has no size with {weights:,} weights")


@dataclass(frozen=True, kw_only=True)
class Probes(Study):
    """The runs of the study.

    Args:
        steps: of every run.
    """

    out: Path = Path("runs/probes")
    page: Path = Path("docs/comparisons/probes")
    seeds: int = 1
    steps: int = 1500
    is_quick: bool = False

    def plan(self, probes: Sequence[str], names: Sequence[str]) -> list[tuple[str, str, int]]:
        """(probe, backbone, bytes that are wanted); a backbone without a choice, or with one result, comes once."""
        found = {}
        for probe in probes:
            for name in names:
                for target in SIZES[: 1 if probe in TRACKING else None]:
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
        words = [f"stream=probes/{probe}", f"backbone={memory.backbone}", *PROBES[probe], *options]
        words += ["optimizer=adamw", "optimizer.lr=0.003", "trainer.clip_norm=1.0", f"trainer.batch_size={BATCH}"]
        words += [f"trainer.max_steps={self.steps}", *(QUICK if self.is_quick else ())]
        words += ["tracking=none", f"seed={seed}"]
        run_to_the_end(self.folder(probe, name, target, seed), words)

    def results(self, probe: str, name: str, target: int) -> list[Result]:
        """Finished runs."""
        paths = [self.folder(probe, name, target, seed) / "result.json" for seed in range(self.seeds)]
        return [run for run in map(Result.load, filter(Path.is_file, paths)) if run.status == "done"]


def probe_table(study: Probes, probe: str) -> str:
    """Accuracy on every domain, by size of state."""
    rows, domains = [], []
    for _, name, target in study.plan([probe], list(MEMORIES)):
        runs = study.results(probe, name, target)
        if not runs:
            continue
        size, hidden, state = chosen(probe, name, target)
        domains = runs[0].domains
        means = [fmean(run.R[-1][j] or 0.0 for run in runs) for j in range(len(domains))]
        weights = active_weights(built(probe, MEMORIES[name], size, hidden))
        rate = median(run.cost["train_samples_per_s"] for run in runs) * LENGTH[probe]
        numbers = (*(f"{100 * mean:.0f}" for mean in means), str(len(runs)), f"{rate:,.0f}")
        rows.append((state, (name, f"{state:,}", f"{weights:,}", *numbers)))
    if not rows:
        return "Not run yet.\n"
    ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    return table(("backbone", "state, bytes", "weights", *domains, "seeds", "tokens/s"), ordered)


def plot(study: Probes) -> None:
    """Accuracy over bytes of state where two sizes are asked, on the domain after the one that was trained."""
    import matplotlib.pyplot as plt

    asked = [probe for probe in PROBES if probe not in TRACKING]
    figure, panels = plt.subplots(1, len(asked), figsize=(11, 5), layout="constrained", squeeze=False)
    points = {}
    for axes, probe in zip(panels[0], asked, strict=True):
        ends = []
        for name in MEMORIES:
            targets = [target for _, _, target in study.plan([probe], [name])]
            found = {target: study.results(probe, name, target) for target in targets}
            label, color = family(name)
            line = [
                (chosen(probe, name, target)[2], 100 * fmean(run.R[-1][1] or 0.0 for run in runs), runs[0].domains[1])
                for target, runs in found.items()
                if runs
            ]
            if line:
                sizes, accuracies, domains = zip(*line, strict=True)
                (points[label],) = axes.plot(sizes, accuracies, marker="o", color=color, lw=1)
                ends.append((int(2 * math.log10(sizes[-1])), accuracies[-1], sizes[-1], name))
                axes.set(xscale="log", title=f"{probe}, {domains[0]}", xlabel="bytes of state", ylabel="accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        last = (0, -math.inf)
        for place, accuracy, size, name in sorted(ends):
            # names of points that lie close together stand above each other
            height = max(accuracy, last[1] + 2.8) if place == last[0] else accuracy
            axes.annotate(name, (size, accuracy), fontsize=7, xytext=(1.08 * size, height))
            last = (place, height)
    figure.legend(points.values(), points, fontsize=8, ncols=2, loc="outside lower center", frameon=False)
    study.page.mkdir(parents=True, exist_ok=True)
    figure.savefig(study.page / FIGURE, dpi=110)
    plt.close(figure)


def page(study: Probes) -> str:
    """Everything from the results on disk."""
    parts = [
        "# Probes: what a memory holds\n",
        f"Made by `python benchmarks/study_probes.py --seeds {study.seeds} --steps {study.steps}`; how it is done is "
        f"in that file's docstring. Accuracy in percent on what is asked, {study.steps} steps of {BATCH} rows, AdamW "
        f"at 0.003 for all; means over seeds. The first column of accuracies "
        "is what was trained. The state of attention grows with the row; the others' does not. Training is short: a "
        "low number may mean slow to learn as well as unable. The memories that are matrices, ridge and titans see "
        "neighbours through a short convolution; attention, recurrences, rmt and armt do not, and must learn first "
        "that a value stands beside its key. In mqar a guess among the values of a row is one in as many as it has "
        "pairs, and whether a run gets beyond it within these steps differs from seed to seed. Words of s5 are made of "
        "swaps of neighbours: with all 120 elements as letters nobody learnt more than the first letter of a word in "
        "as many steps, recurrences included.\n",
    ]
    parts.append(f"![Accuracy over bytes of state, a line for a memory at two sizes]({FIGURE})\n")
    for probe in PROBES:
        parts += [f"## {probe}\n", probe_table(study, probe)]
    return "\n".join(parts)


def main() -> None:
    """Run what is not done, then write the page."""
    parser = Probes.options(__doc__)
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--backbones", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Probes.of(given)
    if study.is_quick:
        study = replace(study, steps=3)
    for probe, name, target in () if given.page_only else study.plan(given.probes, given.backbones):
        for seed in range(study.seeds):
            study.run(probe, name, target, seed)
    plot(study)
    study.write(page(study))


if __name__ == "__main__":
    main()
