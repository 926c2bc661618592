"""The projection study: hypernetworks, projection and parameter space beside rehearsal at equal memory bytes.

    python benchmarks/study_projection.py --data DIR [--out runs/projection] [--page docs/comparisons/projection]
        [--seeds 5] [--jobs 1] [--quick] [--page-only]

Two streams: permuted MNIST, 5 experiences, no task labels; split MNIST, 5 experiences, task labels given to all.
Networks of 784-100-100, the same rows, batches and epochs for everyone.

Bytes kept are the most that a strategy holds between two steps for the sake of earlier experiences, beside one network:

    what it declares (`cost.buffer_bytes`: subspaces, responses, second moments, maps, targets, snapshots, stored rows)
    + 4 bytes for every number that is learnt beyond the network's own (a generator, embeddings, factors, map scores)

State of the optimizer does not count, nor what lives inside an experience only. For every strategy, `replay` and
`derpp` are run with as many rows as fit into its bytes; strategies within a tenth of each other share these runs, at
the bytes of the smallest.

Learning rates (and where a strategy starts an experience from) are chosen per strategy on held-out training rows and a
seed of its own; those of `replay` and `derpp` at the middle one of their sizes. What is done is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from cl.cli import build
from cl.cli.compare import Plan, run_all
from cl.cli.compose import composed, import_from_here, seeded
from cl.result import Result, write_text

TUNING_SEED = 1000
ROW_BYTES: Mapping[str, Mapping[str, int]] = {
    "replay": {"permuted_mnist": 784 + 3 * 8, "split_mnist": 784 + 4 * 8},
    "derpp": {"permuted_mnist": 784 + 3 * 8 + 10 * 4, "split_mnist": 784 + 4 * 8 + 2 * 4},
}
"""Of a stored image with its label, id, experience (and task); with its logits."""
SHARED = 1.1
"""Strategies whose bytes differ by less than this factor are set against the same stored rows."""

STREAMS: Mapping[str, Sequence[str]] = {
    "permuted_mnist": ("stream=permuted_mnist",),
    "split_mnist": ("stream=split_mnist", "stream.setting=task_incremental"),
}
COMMON = ("stream.num_experiences=5", "trainer.batch_size=64", "trainer.evaluate=seen", "tracking=none")
SIZE = ("stream.train_rows=4000", "trainer.epochs=2", "backbone.hidden=[100,100]")
QUICK = ("stream.train_rows=200", "stream.eval_rows=100", "trainer.max_steps=3", "backbone.hidden=[20,20]")

SGD: Mapping[str, Sequence[Any]] = {"optimizer.lr": (0.03, 0.1, 0.3)}
ADAM: Mapping[str, Sequence[Any]] = {"optimizer.lr": (0.001, 0.003, 0.01)}
WITH_ADAM = ("optimizer=adam", "trainer.reset_optimizer=true")
# generators of about the network's size, in the proportions published for split MNIST; one copy of them as target
CHUNKED = ("chunk_size=8000", "targets=generator")
SPIKING = ("backbone=snn", "backbone.rule=ottt")


@dataclass(frozen=True, eq=False)
class Arm:
    """A strategy as it is compared: its words, and the values that are tried for some settings."""

    label: str
    words: Sequence[str]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=lambda: SGD)

    def trials(self) -> list[tuple[str, ...]]:
        """Every combination of the values."""
        return list(itertools.product(*([f"{key}={value}" for value in each] for key, each in self.grid.items())))


def arm(name: str, *options: str, words: Sequence[str] = (), **more: Any) -> Arm:
    """An arm of one strategy with some options of its own."""
    return Arm(name, (f"strategy={name}", *(f"strategy.{name}.{option}" for option in options), *words), **more)


ARMS = (
    arm("naive"),
    arm("hypernet", *CHUNKED, "hidden=[10,10]", words=WITH_ADAM, grid=ADAM),
    arm("rnn_hypernet", *CHUNKED, "units=10", words=WITH_ADAM, grid=ADAM),
    arm("hyper_interval", *CHUNKED, "hidden=[10,10]", words=WITH_ADAM, grid=ADAM),
    arm("gpm"),
    arm("owm"),
    arm("hebbian"),
    arm("rmn", words=WITH_ADAM, grid=ADAM),
    arm("weight_factorization", grid={**SGD, "strategy.weight_factorization.start": ("base", "merged")}),
    arm("recall_merge", grid={**SGD, "strategy.recall_merge.start": ("first", "merged")}),
    Arm("naive, spiking", ("strategy=naive", *SPIKING)),
    Arm("hebbian, spiking", ("strategy=hebbian", *SPIKING)),
)
REFERENCES = ("naive", "naive, spiking")


def stored(name: str, stream: str, num_bytes: int) -> Arm:
    """Rehearsal with as many rows as fit into so many bytes."""
    rows = num_bytes // ROW_BYTES[name][stream]
    return Arm(f"{name}, {rows} rows", (f"strategy={name}", f"strategy.{name}.capacity={rows}"))


@dataclass(frozen=True)
class Study:
    """Where things are and how much of them there is."""

    data: str
    out: Path
    seeds: int
    jobs: int
    size: Sequence[str]

    def config(self, stream: str, arm: Arm, words: Iterable[str] = ()) -> Any:
        common = (*STREAMS[stream], f"data.root={self.data}", *COMMON)
        return composed("run", [*common, *arm.words, *self.size, *words])

    def folder(self, stream: str, arm: Arm) -> Path:
        return self.out / stream / arm.label.replace(", ", "-").replace(" ", "-")

    def run(self, runs: Mapping[Path, dict[str, Any]]) -> None:
        """Run what is not done, in processes of their own."""
        failures = run_all(Plan(self.out, runs, "naive", self.jobs, "projection"), Console())
        if failures:
            raise SystemExit("; ".join(f"{name}: {why}" for name, why in failures.items()))

    def tune(self, stream: str, arms: Sequence[Arm]) -> None:
        """Every combination of each arm's values, once, measured on held-out training rows."""
        on = "stream.eval_on=validation"
        self.run(
            {
                self.folder(stream, arm) / "tuning" / ",".join(trial): seeded(
                    self.config(stream, arm, (*trial, on)), TUNING_SEED
                )
                for arm in arms
                for trial in arm.trials()
            }
        )

    def chosen(self, stream: str, arm: Arm) -> tuple[str, ...]:
        """The combination with the best final accuracy; of equals the one listed first."""

        def final(trial: tuple[str, ...]) -> float:
            path = self.folder(stream, arm) / "tuning" / ",".join(trial) / "result.json"
            return Result.load(path).metrics["final"] or 0.0

        return max(arm.trials(), key=final)

    def measure(self, stream: str, chosen: Mapping[Arm, Sequence[str]]) -> None:
        """Every arm on all seeds, with its combination."""
        self.run(
            {
                self.folder(stream, arm) / f"seed-{seed}": seeded(self.config(stream, arm, words), seed)
                for seed in range(self.seeds)
                for arm, words in chosen.items()
            }
        )

    def results(self, stream: str, arm: Arm) -> list[Result]:
        paths = sorted(self.folder(stream, arm).glob("seed-*/result.json"))
        return [result for result in map(Result.load, paths) if result.status == "done"]

    def num_learnt(self, stream: str, arm: Arm) -> int:
        """Numbers that are trained."""
        model = build.make_trainer(seeded(self.config(stream, arm), 0), {}, run_dir=None, observers=()).state.model
        return sum(p.numel() for p in model.parameters())


def without_rehearsal(study: Study, stream: str) -> dict[str, dict[str, Any]]:
    """Run all strategies of the study; for each by label, its chosen words and the bytes that it keeps."""
    study.tune(stream, ARMS)
    chosen = {arm: study.chosen(stream, arm) for arm in ARMS}
    study.measure(stream, chosen)
    found = {}
    for arm in ARMS:
        plain = next(each for each in ARMS if each.label == ("naive, spiking" if "spiking" in arm.label else "naive"))
        more = max(0, study.num_learnt(stream, arm) - study.num_learnt(stream, plain))
        declared = max(result.cost["buffer_bytes"] for result in study.results(stream, arm))
        found[arm.label] = {"chosen": chosen[arm], "bytes": declared + 4 * more}
    return found


def with_rehearsal(study: Study, stream: str, table: dict[str, dict[str, Any]]) -> None:
    """Run replay and derpp at the bytes of the others; notes in the table which of them a strategy is set against."""
    groups: list[list[str]] = []
    for label in sorted((label for label in table if label not in REFERENCES), key=lambda each: table[each]["bytes"]):
        is_near = groups and table[label]["bytes"] < SHARED * table[groups[-1][0]]["bytes"]
        groups[-1].append(label) if is_near else groups.append([label])
    budgets = [table[group[0]]["bytes"] for group in groups]
    for name in ROW_BYTES:
        middle = stored(name, stream, budgets[len(budgets) // 2])
        study.tune(stream, [middle])
        words = study.chosen(stream, middle)
        arms = {num_bytes: stored(name, stream, num_bytes) for num_bytes in budgets}
        study.measure(stream, dict.fromkeys(arms.values(), words))
        for group, (num_bytes, arm) in zip(groups, arms.items(), strict=True):
            declared = max(result.cost["buffer_bytes"] for result in study.results(stream, arm))
            assert declared <= num_bytes, f"{arm.label} keeps {declared} bytes, not {num_bytes}"
            table[arm.label] = {"chosen": words, "bytes": declared, "words": arm.words}
            for label in group:
                table[label][name] = arm.label


READING = """How to read it:

- Bytes kept are what a strategy holds for earlier experiences beside one network of 784-100-100; how they are counted
  is in the docstring of `benchmarks/study_projection.py`. `replay` and `derpp` stand in a row with as many stored rows
  as fit into the bytes of that row's strategy.
- Not comparable: on permuted MNIST nobody has task labels at test, but all strategies except `replay`, `derpp` and
  `naive` are told when an experience ends, and `hypernet`, `rnn_hypernet` and `rmn` answer each row once for every
  experience and keep the surest answer. On split MNIST everyone has the task label and a head for each task, which
  rehearsal could do without.
- Hypernetworks and `rmn` are trained by Adam, made anew for every experience as published; all others by SGD. All see
  the same rows equally often: few steps for a hypernetwork, whose published protocols take thousands a task.
- `owm` keeps its second moments in float64. `rmn` counts one bit for each weight and finished map, and the scores of
  the map that is being learnt.
- Spiking networks take six passes where the others take one; their `replay` and `derpp` are those of the MLP.
- Settings other than those tuned are the defaults; mean and standard deviation over seeds. Five seeds are too few for a
  paired test (the smallest p is 0.06).
"""


def page(study: Study, tables: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """The Markdown page."""
    rates = {"SGD": SGD, "Adam": ADAM}
    grids = "; ".join(f"{name}: {', '.join(map(str, grid['optimizer.lr']))}" for name, grid in rates.items())
    parts = [
        "# Hypernetworks, projection and parameter space beside rehearsal at equal bytes\n",
        f"Made by `python benchmarks/study_projection.py --data DATA --seeds {study.seeds}`. 5 experiences, "
        f"{', '.join(study.size)}, batches of 64, all test rows; rates chosen on validation rows and seed "
        f"{TUNING_SEED} ({grids}).\n",
        READING,
    ]
    for stream, table in tables.items():
        parts += [f"## {stream}\n", _table(study, stream, table)]
    return "\n".join(parts)


def _table(study: Study, stream: str, table: Mapping[str, dict[str, Any]]) -> str:
    head = ("strategy", "final", "forgetting (max)", "learning", "bytes kept", "replay at these", "derpp at these")
    rows = []
    for arm in ARMS:
        entry, runs = table[arm.label], study.results(stream, arm)
        others = [_final(study.results(stream, Arm(entry[name], ()))) if name in entry else "" for name in ROW_BYTES]
        cells = (arm.label, _final(runs), _mean(runs, "forgetting_max"), _mean(runs, "learning"))
        settings = _settings(entry["chosen"])
        rows.append((_average(runs), (*cells, f"{entry['bytes']:,}", *others, settings, str(len(runs)))))
    ranked = [cells for _, cells in sorted(rows, reverse=True)]
    lines = [(*head, "chosen", "seeds"), ("---",) * (len(head) + 2), *ranked]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + _rehearsal(study, stream, table)


def _rehearsal(study: Study, stream: str, table: Mapping[str, dict[str, Any]]) -> str:
    """The runs that the columns of replay and derpp come from."""
    lines = [("rehearsal", "final", "forgetting (max)", "learning", "bytes kept", "chosen"), ("---",) * 6]
    for label, entry in table.items():
        if "words" in entry:
            runs = study.results(stream, Arm(label, ()))
            measures = (_final(runs), _mean(runs, "forgetting_max"), _mean(runs, "learning"))
            settings = _settings(entry["chosen"])
            lines.append((label, *measures, f"{entry['bytes']:,}", settings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _settings(words: Sequence[str]) -> str:
    """Chosen words without the groups that they belong to."""
    pairs = (word.partition("=") for word in words)
    return " ".join(f"{name.rpartition('.')[2]}={value}" for name, _, value in pairs)


def _average(runs: Sequence[Result], metric: str = "final") -> float:
    return 100 * statistics.fmean(run.metrics[metric] or 0.0 for run in runs)


def _mean(runs: Sequence[Result], metric: str) -> str:
    return f"{_average(runs, metric):.1f}"


def _final(runs: Sequence[Result]) -> str:
    """Mean and standard deviation of final accuracy over seeds, in percent."""
    finals = [100 * (run.metrics["final"] or 0.0) for run in runs]
    return f"{statistics.fmean(finals):.1f} ± {statistics.stdev(finals) if len(finals) > 1 else 0.0:.1f}"


def main() -> None:
    """Run what is not done, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/projection"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparisons/projection"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a size that means nothing, to see that all of it runs")
    parser.add_argument("--page-only", action="store_true", help="run nothing; write the page from what there is")
    given = parser.parse_args()
    import_from_here()
    study = Study(given.data, given.out, given.seeds, given.jobs, QUICK if given.quick else SIZE)
    tables = {}
    for stream in STREAMS:
        path = study.out / stream / "table.json"
        if not given.page_only:
            table = without_rehearsal(study, stream)
            with_rehearsal(study, stream, table)
            write_text(path, json.dumps(table, indent=1) + "\n")
        tables[stream] = json.loads(path.read_text())
    write_text(given.page / "README.md", page(study, tables))


if __name__ == "__main__":
    main()
