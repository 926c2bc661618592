"""The memory study: does any memory reduce forgetting at equal parameters, with and without the same replay?

    python benchmarks/study_memory.py --data DIR [--out runs/memory] [--page FOLDER] [--seeds 5] [--quick] [--page-only]

Nine backbones of two blocks, the same width, and hidden widths such that all have as many parameters as the
transformer (within 3 %), on three streams that are read as sequences: permuted MNIST and split MNIST (a head per
experience) row by row, 28 steps of 28 pixels, and the bytes of C4, then WikiText, then GSM8K. Each is trained by
plain training, replay, EWC and k-FPF. Chosen on held-out training rows and another seed: the learning rate of each
backbone, under plain training, and kept for the other strategies; and EWC's strength, on the transformer, for all.

Everything is `cl compare`, one folder each, so the same command goes on where it was stopped. Differences are taken
seed by seed against the transformer under the same strategy, with Student's intervals, and tested with Holm's
adjustment over the backbones of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
from _fit import active_weights, fitted, network
from _study import TUNE_ON_TEXT, Comparisons, chosen, finished, student, table

from cl.core import Batch, Setting, StreamInfo
from cl.metrics.statistics import ALPHA, holm
from cl.result import Result
from cl.state import tensor_bytes

WIDTH, LAYERS, CONTEXT = 48, 2, 64
BATCH = {"permuted_mnist": 16, "split_mnist": 16, "text": 8}
SHAPE = (f"backbone.width={WIDTH}", f"backbone.num_layers={LAYERS}", "backbone.num_heads=4")
BACKBONES: Mapping[str, Sequence[str]] = {
    "transformer": ("backbone=gpt",),
    "gated_deltanet": ("backbone=linear_memory", "backbone.blocks='linear_memory(rule=gated_delta)'"),
    "mamba2": ("backbone=linear_memory", "backbone.blocks='linear_memory(rule=mamba2)'"),
    "ridge_memory": ("backbone=ridge_memory",),
    "titans": ("backbone=neural_memory",),
    "min_gru": ("backbone=scan_rnn",),
    "gru": ("backbone=nonlinear_rnn",),
    "armt": ("backbone=armt",),
    # experts would make equal parameters and equal work two different things
    "trc2": ("backbone=trc2", "backbone.mlp=swiglu", "backbone.num_kv_heads=4"),
}
SEGMENTS = {"permuted_mnist": 7, "split_mnist": 7, "text": 16}

COMMON = ("optimizer=adamw", "trainer.clip_norm=1.0", "trainer.evaluate=seen", "tracking=none", *SHAPE)
IMAGES = ("stream.train_rows=4000", "stream.eval_rows=300")
STREAMS: Mapping[str, Sequence[str]] = {
    "permuted_mnist": ("stream=permuted_mnist", "stream.num_experiences=3", "trainer.max_steps=50", *IMAGES),
    "split_mnist": ("stream=split_mnist", "stream.setting=task_incremental", "trainer.max_steps=20", *IMAGES),
    "text": ("stream=text_domains", f"stream.context={CONTEXT}", "stream.eval_tokens=4096", "trainer.max_steps=50"),
}
INFOS = {
    "permuted_mnist": StreamInfo("permuted", Setting.DOMAIN_INCREMENTAL, (1, 28, 28), 10, 3),
    "split_mnist": StreamInfo("split", Setting.TASK_INCREMENTAL, (1, 28, 28), 2, 5),
    "text": StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (CONTEXT,), 257, 3, measure="loss", separator=256),
}
RATES, STRENGTHS = "tune={optimizer.lr: [0.0015, 0.004]}", "tune={strategy.ewc.strength: [30, 300]}"
STRATEGIES: Mapping[str, Sequence[str]] = {
    "naive": (),
    "replay": ("strategy.replay.capacity=100",),
    "ewc": ("strategy.ewc.importance_rows=32",),
    "kfpf": tuple(
        f"strategy.kfpf.{word}"
        for word in ("capacity=100", "k=3", "steps=20", "replay_batch_size=16", "snapshot_steps=20")
    ),
}
QUICK = ("trainer.max_steps=4", "trainer.eval_rows=32")

READING = """What five seeds say:

- No difference in favour of a memory is significant, under any strategy on any stream; five against are: ridge memory
  with replay on both streams of images and under k-FPF on split MNIST, Gated DeltaNet on text, plain and under EWC. On
  images intervals are wide (up to ±0.3), on text narrow, and there most memories lean to forgetting more.
- Most memories learn faster, but not everywhere. On text all but ARMT and TRC² end 0.10 to 0.20 nats below the
  transformer, whatever the strategy, and significantly. On permuted MNIST Gated DeltaNet, Mamba-2, ridge memory and
  Titans learn more of each experience than the transformer under every strategy, on split MNIST mostly, but less under
  k-FPF; minGRU and GRU learn less everywhere on images. With replay on permuted MNIST these four end 0.09 to 0.12 above
  it; on split MNIST plain TRC² ends 0.13 below, ridge memory under k-FPF 0.26. A better final measure is not less
  forgetting.
- Replay of 100 rows lowers the forgetting of every backbone on every stream.
- Equal are parameters, rows and updates, not work: tokens/s are medians of runs on one thread, beside another study.
"""


@dataclass(frozen=True, kw_only=True)
class Memory(Comparisons):
    """The runs of the study."""

    out: Path = Path("runs/memory")
    page: Path = Path("docs/comparisons/memory")
    seeds: int = 5
    is_quick: bool = False

    def folder(self, stream: str, backbone: str, part: str) -> Path:
        """Of a comparison: plain training, which chooses the rate; the transformer's EWC; or the other strategies."""
        return self.out / stream / f"{backbone}-{part}"

    def request(self, stream: str, backbone: str) -> tuple[str, ...]:
        """Words for a backbone as large as the transformer."""
        words = (*COMMON, *STREAMS[stream], f"trainer.batch_size={BATCH[stream]}", *BACKBONES[backbone])
        if backbone == "armt":
            words = (*words, f"backbone.segment={SEGMENTS[stream]}")
        target = active_weights(network([*COMMON, *BACKBONES["transformer"]], INFOS[stream]))
        return fitted(words, target, INFOS[stream], multiple=2)

    def train(self, stream: str, backbone: str) -> None:
        """Plain training goes first and chooses the rate; then the other strategies, at that rate."""
        self.train_some(stream, backbone, "naive", ["naive"], RATES)
        rate = chosen(self.folder(stream, backbone, "naive"))
        if backbone == "transformer":
            # also where its EWC is run: the strength that the others get is chosen here
            self.train_some(stream, backbone, "ewc", ["ewc"], STRENGTHS, *rate)
        strength = chosen(self.folder(stream, "transformer", "ewc"))
        others = [name for name in STRATEGIES if name != "naive" and (name, backbone) != ("ewc", "transformer")]
        self.train_some(stream, backbone, "others", others, *rate, *strength[: "ewc" in others])

    def train_some(self, stream: str, backbone: str, part: str, strategies: Sequence[str], *words: str) -> None:
        """A run that fails is missing on the page."""
        words = (
            *self.request(stream, backbone),
            *(QUICK if self.is_quick else ()),
            *(word for name in strategies for word in STRATEGIES[name]),
            *words,
        )
        is_tuned = any(word.startswith("tune=") for word in words)
        tune_on = (f"tune_on={TUNE_ON_TEXT}",) if is_tuned and stream == "text" else ()
        self.compare(self.folder(stream, backbone, part), strategies, *words, *tune_on, may_fail=True)

    def results(self, stream: str, backbone: str, strategy: str) -> dict[int, Result]:
        """Finished runs by seed."""
        runs = finished(self.out / stream, f"{backbone}-*/{strategy}/seed-*/result.json")
        return {run.seed: run for run in runs}


# the page


def metric(name: str) -> Callable[[Result], float]:
    """A metric of a run by its name."""
    return lambda run: float(run.metrics[name] or 0.0)


FORGETTING, FINAL, LEARNING = metric("forgetting_first"), metric("final"), metric("learning")


def against_transformer(
    study: Memory, stream: str, strategy: str, value: Callable[[Result], float], words: tuple[str, str]
) -> dict[str, tuple[str, str]]:
    """Of each backbone the paired difference with its interval, and what may be said of it.

    Args:
        words: for a difference below zero and for one above.
    """
    reference = study.results(stream, "transformer", strategy)
    found = {}
    for name in BACKBONES:
        runs = study.results(stream, name, strategy)
        shared = sorted(runs.keys() & reference.keys())
        if name != "transformer" and shared:
            found[name] = [value(runs[seed]) - value(reference[seed]) for seed in shared]
    tested = {name: student(differences) for name, differences in found.items()}
    adjusted = dict(zip(tested, holm([p for _, _, p in tested.values()]), strict=True)) if tested else {}
    return {
        name: (
            f"{fmean(differences):+.3f} [{tested[name][0]:+.3f}, {tested[name][1]:+.3f}]",
            "not significant" if not adjusted[name] < ALPHA else words[fmean(differences) > 0],
        )
        for name, differences in found.items()
    }


def results_table(study: Memory, stream: str, strategy: str) -> str:
    """One row per backbone: what it learned, what was left, what it forgot, and the difference to the transformer."""
    better = ("better", "worse") if INFOS[stream].measure == "loss" else ("worse", "better")
    forgotten = against_transformer(study, stream, strategy, FORGETTING, ("forgets less", "forgets more"))
    left = against_transformer(study, stream, strategy, FINAL, better)
    rows = []
    for name in BACKBONES:
        runs = list(study.results(stream, name, strategy).values())
        if runs:
            means = (f"{fmean(map(value, runs)):.3f}" for value in (LEARNING, FINAL, FORGETTING))
            rows.append((name, *means, *forgotten.get(name, ("", "")), *left.get(name, ("", ""))))
    head = ("backbone", "learned", "final", "forgetting", "its difference", "", "difference of final", "")
    return table(head, rows) if rows else "Not run yet.\n"


def state_bytes(stream: str, words: Sequence[str]) -> int:
    """What one row leaves behind after all its steps, in bytes."""
    info = INFOS[stream]
    shape = (1, *info.input_shape)
    is_text = info.setting == Setting.CONTINUAL_PRETRAINING
    inputs = torch.zeros(shape, dtype=torch.int64) if is_text else torch.zeros(shape)
    zero = torch.zeros(1, dtype=torch.int64)
    targets = torch.zeros(shape, dtype=torch.int64) if is_text else zero
    model = network(words, info).eval()
    with torch.no_grad():
        return tensor_bytes(model.step(Batch(inputs, targets, zero, zero, task_id=zero)).state)


def cost_table(study: Memory, stream: str) -> str:
    """Parameters, state and speed of each backbone under plain training."""
    # an image is one sample, which is read in as many steps as it has rows
    steps = 1 if stream == "text" else 28
    rows = []
    for name in BACKBONES:
        runs = list(study.results(stream, name, "naive").values())
        if runs:
            words = study.request(stream, name)
            rate = median(run.cost["train_samples_per_s"] for run in runs) * steps
            size = sum(p.numel() for p in network(words, INFOS[stream]).parameters())
            tuned = ", ".join(word.split("=")[-1] for word in chosen(study.folder(stream, name, "naive")))
            rows.append((name, f"{size:,}", f"{state_bytes(stream, words):,}", f"{rate:,.0f}", tuned))
    return table(("backbone", "parameters", "state after a row, bytes", "tokens/s", "rate"), rows)


def summary(study: Memory) -> str:
    """How many of the comparisons said anything."""
    rows = []
    for stream in STREAMS:
        for strategy in STRATEGIES:
            found = against_transformer(study, stream, strategy, FORGETTING, ("less", "more"))
            if found:
                named = {word: [n for n, (_, verdict) in found.items() if verdict == word] for word in ("less", "more")}
                rows.append((stream, strategy, *(", ".join(named[word]) or "none" for word in ("less", "more"))))
    return table(("stream", "strategy", "forgets less than the transformer", "forgets more"), rows)


def page(study: Memory) -> str:
    """Everything from the results on disk; what is not there says so."""
    parts = [
        "# Memory: does it reduce forgetting?\n",
        f"Made by `python benchmarks/study_memory.py --data DATA --seeds {study.seeds}`; how it is done is in that "
        f"file's docstring. Two blocks of width {WIDTH}, AdamW at a constant rate. `learned` is "
        "the measure of each experience right after it, `forgetting` how much of that was lost at the end (positive is "
        "worse), both averaged; accuracy on images, nats per byte on text. Differences are to the transformer under "
        "the same strategy, seed by seed, with 95 % Student intervals; the words beside them are a test at 5 % with "
        "Holm's adjustment over the backbones of the table. So few seeds show large differences only: `not "
        "significant` does not mean equal. Networks are small and training is short; nothing is said of larger ones.\n",
        READING,
        "## What was significant\n",
        summary(study),
    ]
    for stream in STREAMS:
        parts += [f"## {stream}\n", cost_table(study, stream)]
        for strategy in STRATEGIES:
            parts += [f"### {stream}, {strategy}\n", results_table(study, stream, strategy)]
    return "\n".join(parts)


def main() -> None:
    """Run what is not done, then write the page."""
    parser = Memory.options(__doc__)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    given = parser.parse_args()
    study = Memory.of(given)
    for stream in () if given.page_only else given.streams:
        for backbone in given.backbones:
            study.train(stream, backbone)
    study.write(page(study))


if __name__ == "__main__":
    main()
