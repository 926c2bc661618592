"""The rehearsal study: every strategy of the family at equal memory and at equal compute, each at its own best rate.

    python benchmarks/study_rehearsal.py --data DIR [--out runs/study] [--page docs/comparisons/rehearsal] [--seeds 5]

Two streams (split MNIST, class-incremental; permuted MNIST, 10 experiences, domain-incremental) and two budgets:

- memory: one pass over the rows; a strategy stores at most as many bytes as `replay` does with 200 images. Copies of
  the network that a strategy keeps are not stored rows; the table has them in the bytes.
- compute: as many sample-backwards as `replay` takes in that one pass, so that cheaper strategies train longer.

The learning rate of each strategy is chosen in the memory budget, on held-out training rows and a seed of its own, and
kept in the other. All of it is `cl compare` (this file only writes its commands), so the same command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cl.cli.main import main as cl
from cl.result import Result, write_text

RATES = "{optimizer.lr: [0.01, 0.03, 0.1, 0.3]}"
ROWS = {"split_mnist": 12000, "permuted_mnist": 6000}
"""Training rows of MNIST that are shown, every class in its share: the study is to take half an hour, not a day."""
BATCH = 32

READING = """How to read it:

- Mean and standard deviation over seeds; five seeds are too few for a paired test (the smallest p is 0.06).
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
    # codes of 32 bytes and their origin; the codebooks are a tenth of the budget
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


@dataclass(frozen=True)
class Study:
    """Where things are and how much of them there is."""

    data: str
    out: Path
    seeds: int
    jobs: int

    def folder(self, stream: str, budget: str) -> Path:
        return self.out / f"{stream}-{budget}"

    def compare(self, stream: str, budget: str, compositions: Sequence[str], *words: str) -> None:
        """One `cl compare` into the folder of a stream and a budget."""
        names = {name for each in compositions for name in each.strip("[]").split(",")}
        options = [word for name in sorted(names) for word in OPTIONS.get(name, ())]
        fixed = (f"data.root={self.data}", f"out={self.folder(stream, budget)}", f"jobs={self.jobs}")
        request = (f"strategies=[{','.join(compositions)}]", f"seeds={self.seeds}")
        rows = f"stream.train_rows={ROWS[stream]}"
        code = cl(["compare", *STREAMS[stream], rows, *COMMON, *options, *fixed, *request, *words])
        if code:
            raise SystemExit(code)

    def results(self, stream: str, budget: str) -> dict[str, list[Result]]:
        """Finished runs by composition."""
        found: dict[str, list[Result]] = {}
        for path in sorted(self.folder(stream, budget).glob("*/seed-*/result.json")):
            result = Result.load(path)
            if result.status == "done":
                found.setdefault(path.parents[1].name, []).append(result)
        return found


def label(composition: str) -> str:
    """Folder of a composition."""
    return composition.strip("[]").replace(",", "+")


def at_equal_memory(study: Study, stream: str) -> None:
    """One pass, rates chosen before."""
    study.compare(stream, "memory", COMPOSITIONS[stream], f"tune={RATES}")


def at_equal_compute(study: Study, stream: str) -> None:
    """Each composition with its chosen rate, and as many steps as the backwards of one pass of replay pay for."""
    chosen = json.loads((study.folder(stream, "memory") / "tuning.json").read_text())
    done = study.results(stream, "memory")
    budget = done["replay"][0].cost["backwards"]
    for composition in COMPOSITIONS[stream]:
        run = done[label(composition)][0]
        per_experience = run.cost["updates"] / len(run.experiences)
        steps = max(1, round(per_experience * budget / run.cost["backwards"]))
        words = (*chosen[label(composition)]["chosen"], "trainer.epochs=null", f"trainer.max_steps={steps}")
        study.compare(stream, "compute", [composition], f"reference={label(composition)}", *words)
    cl(["report", str(study.folder(stream, "compute"))])


def page(study: Study, folder: Path) -> str:
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
            figure = folder / "figures" / f"{stream}-{budget}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "figures" / "cost.png", figure)
            parts += [
                f"## {stream}, equal {budget}\n",
                _table(study, stream, budget),
                f"![cost](figures/{figure.name})\n",
            ]
    return "\n".join(parts)


def _table(study: Study, stream: str, budget: str) -> str:
    chosen = json.loads((study.folder(stream, "memory") / "tuning.json").read_text())
    rows = []
    for name, runs in study.results(stream, budget).items():
        finals = [100 * run.metrics["final"] for run in runs]
        mean = sum(finals) / len(finals)
        spread = (sum((value - mean) ** 2 for value in finals) / max(1, len(finals) - 1)) ** 0.5
        forgetting = [100 * (run.metrics["forgetting_max"] or 0.0) for run in runs]
        cost, rate = runs[0].cost, chosen[name]["chosen"][0].partition("=")[2]
        cells = (name, f"{mean:.1f} ± {spread:.1f}", f"{sum(forgetting) / len(forgetting):.1f}", rate)
        rows.append((mean, (*cells, f"{cost['backwards']:,.0f}", f"{cost['buffer_bytes']:,.0f}", str(len(runs)))))
    head = ("strategy", "final", "forgetting (max)", "rate", "sample-backwards", "bytes kept", "seeds")
    lines = [head, ("---",) * len(head), *(cells for _, cells in sorted(rows, reverse=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Run what is not done, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparisons/rehearsal"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    study = Study(given.data, given.out, given.seeds, given.jobs)
    for stream in STREAMS:
        at_equal_memory(study, stream)
        at_equal_compute(study, stream)
    write_text(given.page / "README.md", page(study, given.page))


if __name__ == "__main__":
    main()
