"""The rehearsal study: every strategy of the family at equal memory and at equal compute, each at its own best rate.

    python benchmarks/study_rehearsal.py --data DIR [--out runs/study] [--page docs/comparisons/rehearsal] [--seeds 5]

Two streams (split MNIST, class-incremental; permuted MNIST, 10 experiences, domain-incremental) and two budgets:

- memory: one pass over the rows; a strategy stores at most as many bytes of rows as `replay` does with 200 images.
  Copies of the network and codebooks that a strategy keeps are not stored rows; the table has them in the bytes.
- compute: as many sample-backwards as `replay` takes in that one pass, so that cheaper strategies train longer.

The learning rate of each strategy is chosen in the memory budget, on held-out training rows and a seed of its own, and
kept in the other. All of it is `cl compare` (this file only writes its commands), so the same command goes on where it
was stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from _study import Comparisons, carry_out, chosen, finished, label, spread, table

from cl.result import Result

RATES = "{optimizer.lr: [0.01, 0.03, 0.1, 0.3]}"
ROWS = {"split_mnist": 12000, "permuted_mnist": 6000}
"""Training rows of MNIST that are shown, every class in its share: the study is to take half an hour, not a day."""
BATCH = 32

READING = """How to read it:

- Mean and standard deviation over seeds; five seeds are too few for a paired test (the smallest p is 0.06).
- Equal memory is what is stored of rows: at most the bytes of 200 images (161,600). Copies of networks and `remind`'s
  codebooks (102,400 bytes) come on top, and `sharp` and `prd` are at their defaults, not fitted to the budget, so the
  bytes kept run from 0 to 10.8 MB.
- Equal compute scales the number of steps. Work that does not depend on it (finetuning of `kfpf` at its triggers, the
  Fisher information of `refresh`) stays, so those take more: the column of sample-backwards says how much.
- `frequency_replay` balances classes that come back; here none does, so it is naive training.
- `gdumb` trains on its memory alone: one pass over it in the memory budget, which is very little.
- `generative_replay`, `sharp`, `prd`, `fast_slow`, `remind` and `icarl` are at their defaults but for the rate; a
  strategy that is low here may be better with other settings or more training.
"""

COMMON = (f"trainer.batch_size={BATCH}", "trainer.epochs=1", "tracking=none")

STREAMS: Mapping[str, Sequence[str]] = {
    "split_mnist": ("stream=split_mnist", "backbone.hidden=[100,100]"),
    "permuted_mnist": ("stream=permuted_mnist", "stream.num_experiences=10", "backbone.hidden=[100,100]"),
}

OPTIONS: Mapping[str, Sequence[str]] = {
    # 200 images of 784 bytes; logits take the place of a few images
    "replay": ("strategy.replay.capacity=200",),
    "derpp": ("strategy.derpp.capacity=190",),
    "refresh": (),
    "kfpf": ("strategy.kfpf.capacity=200",),
    "fpf": ("strategy.fpf.buffer_of=replay",),
    "gdumb": ("strategy.gdumb.capacity=200",),
    "icarl": ("strategy.icarl.capacity=200",),
    "replay_distillation": ("strategy.replay_distillation.capacity=200",),
    "frequency_replay": ("strategy.frequency_replay.rows_per_class=20",),
    # codes of 32 bytes and their origin, and codebooks of 102,400 bytes, of a budget of 161,600
    "remind": ("strategy.remind.capacity=2000", "strategy.remind.crop=false"),
    "sharp": (),
}

COMPOSITIONS: Mapping[str, Sequence[str]] = {
    "split_mnist": (
        "naive",
        "replay",
        "derpp",
        "[derpp,refresh]",
        "[replay,fpf]",
        "kfpf",
        "gdumb",
        "icarl",
        "replay_distillation",
        "frequency_replay",
        "remind",
        "prd",
        "sharp",
        "fast_slow",
        "generative_replay",
    ),
    "permuted_mnist": (
        "naive",
        "replay",
        "derpp",
        "[derpp,refresh]",
        "[replay,fpf]",
        "kfpf",
        "gdumb",
        "replay_distillation",
        "remind",
        "center_loss",
        "fast_slow",
        "generative_replay",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rehearsal(Comparisons):
    """The runs of the study."""

    out: Path = Path("runs/study")
    page: Path = Path("docs/comparisons/rehearsal")
    seeds: int = 5
    jobs: int = 2

    def folder(self, stream: str, budget: str) -> Path:
        return self.out / f"{stream}-{budget}"

    def train(self, stream: str, budget: str, compositions: Sequence[str], *words: str) -> None:
        """Into the folder of a stream and a budget."""
        names = {name for each in compositions for name in each.strip("[]").split(",")}
        options = [word for name in sorted(names) for word in OPTIONS.get(name, ())]
        common = (*STREAMS[stream], f"stream.train_rows={ROWS[stream]}", *COMMON, *options)
        self.compare(self.folder(stream, budget), compositions, *common, *words)

    def results(self, stream: str, budget: str) -> dict[str, list[Result]]:
        """Finished runs by composition."""
        found: dict[str, list[Result]] = {}
        for run in finished(self.folder(stream, budget)):
            found.setdefault(run.label, []).append(run)
        return found


def at_equal_memory(study: Rehearsal, stream: str) -> None:
    """One pass, rates chosen before."""
    study.train(stream, "memory", COMPOSITIONS[stream], f"tune={RATES}")


def at_equal_compute(study: Rehearsal, stream: str) -> None:
    """Each composition with its chosen rate, and as many steps as the backwards of one pass of replay pay for."""
    done = study.results(stream, "memory")
    budget = done["replay"][0].cost["backwards"]
    for composition in COMPOSITIONS[stream]:
        run = done[label(composition)][0]
        per_experience = run.cost["updates"] / len(run.experiences)
        steps = max(1, round(per_experience * budget / run.cost["backwards"]))
        rate = chosen(study.folder(stream, "memory"), label(composition))
        study.train(stream, "compute", [composition], *rate, "trainer.epochs=null", f"trainer.max_steps={steps}")
    carry_out(["report", str(study.folder(stream, "compute"))], may_fail=True)


def page(study: Rehearsal) -> str:
    """The Markdown page: a table per stream and budget, from the reports, with the figures beside it."""
    parts = [
        "# Rehearsal strategies at equal memory and at equal compute\n",
        f"Made by `python benchmarks/study_rehearsal.py --data DATA --seeds {study.seeds}`; how it is done is in that "
        f"file's docstring. {' and '.join(f'{rows:,} ({stream})' for stream, rows in ROWS.items())} training rows of "
        f"MNIST, all 10,000 test rows, batches of {BATCH}, SGD; learning rates chosen per strategy on validation rows "
        "and a seed of its own.\n",
        READING,
    ]
    for stream in STREAMS:
        for budget in ("memory", "compute"):
            source = study.folder(stream, budget) / "report"
            figure = study.page / "figures" / f"{stream}-{budget}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "figures" / "cost.png", figure)
            parts += [
                f"## {stream}, equal {budget}\n",
                results_table(study, stream, budget),
                f"![cost](figures/{figure.name})\n",
            ]
    return "\n".join(parts)


def results_table(study: Rehearsal, stream: str, budget: str) -> str:
    """One row per composition, the best first."""
    rows = []
    for name, runs in study.results(stream, budget).items():
        finals = [100 * run.metrics["final"] for run in runs]
        forgetting = fmean(100 * (run.metrics["forgetting_max"] or 0.0) for run in runs)
        cost, rate = runs[0].cost, chosen(study.folder(stream, "memory"), name)[0].partition("=")[2]
        costs = (f"{cost['backwards']:,.0f}", f"{cost['buffer_bytes']:,.0f}")
        cells = (name, spread(finals, ".1f"), f"{forgetting:.1f}", rate, *costs, str(len(runs)))
        rows.append((fmean(finals), cells))
    head = ("strategy", "final", "forgetting (max)", "rate", "sample-backwards", "bytes kept", "seeds")
    return table(head, [cells for _, cells in sorted(rows, reverse=True)])


def main() -> None:
    """Run what is not done, then write the page."""
    given = Rehearsal.options(__doc__).parse_args()
    study = Rehearsal.of(given)
    for stream in () if given.page_only else STREAMS:
        at_equal_memory(study, stream)
        at_equal_compute(study, stream)
    study.write(page(study))


if __name__ == "__main__":
    main()
