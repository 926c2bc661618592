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

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from _projection_runs import (
    ADAM,
    ARMS,
    ROW_BYTES,
    SGD,
    STREAMS,
    TUNING_SEED,
    Arm,
    Projection,
    with_rehearsal,
    without_rehearsal,
)
from _study import spread, table

from cl.cli.compose import import_from_here
from cl.result import Result, write_text

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
- `owm` keeps its second moments in float64. `rmn` counted one bit for each weight and finished map, and the scores of
  the map that is being learnt; since then it declares the byte of each weight and map that it takes.
- Spiking networks take six passes where the others take one; their `replay` and `derpp` are those of the MLP.
- Settings other than those tuned are the defaults, and of `hebbian` the published five inner steps; mean and standard
  deviation over seeds. Five seeds are too few for a paired test (the smallest p is 0.06).
"""


def page(study: Projection, tables: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
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
    for stream, entries in tables.items():
        parts += [f"## {stream}\n", ahead(study, stream, entries)]
        parts += [strategies_table(study, stream, entries), rehearsal_table(study, stream, entries)]
    return "\n".join(parts)


MEASURES = ("final", "forgetting (max)", "learning", "bytes kept")


def strategies_table(study: Projection, stream: str, entries: Mapping[str, dict[str, Any]]) -> str:
    """One row per strategy, the best first, beside rehearsal in its bytes."""
    rows = []
    for arm in ARMS:
        entry, runs = entries[arm.label], study.results(stream, arm)
        others = [final(study.results(stream, Arm(entry[name], ()))) if name in entry else "" for name in ROW_BYTES]
        cells = (arm.label, *measured(entry, runs), *others, settings(entry["chosen"]), str(len(runs)))
        rows.append((average(runs, "final"), cells))
    head = ("strategy", *MEASURES, "replay at these", "derpp at these", "chosen", "seeds")
    return table(head, [cells for _, cells in sorted(rows, reverse=True)])


def ahead(study: Projection, stream: str, entries: Mapping[str, dict[str, Any]]) -> str:
    """What the tables come to: who ends above naive, and above rehearsal in as many bytes."""
    ends = {arm.label: average(study.results(stream, arm), "final") for arm in ARMS}
    rivals = {"naive": {label: ends["naive, spiking" if "spiking" in label else "naive"] for label in ends}}
    for name in ROW_BYTES:
        stored = {label: entries[label][name] for label in ends if name in entries[label]}
        rivals[name] = {label: average(study.results(stream, Arm(row, ())), "final") for label, row in stored.items()}
    found = []
    for name, other in rivals.items():
        better = [f"`{label}`" for label in other if ends[label] > other[label]]
        found.append(f"than {name}: {', '.join(better) or 'none'}")
    return f"Higher in mean final accuracy (rehearsal has as many bytes): {'; '.join(found)}.\n"


def rehearsal_table(study: Projection, stream: str, entries: Mapping[str, dict[str, Any]]) -> str:
    """The runs that the columns of replay and derpp come from."""
    stored = {label: entry for label, entry in entries.items() if "words" in entry}
    rows = [
        (label, *measured(entry, study.results(stream, Arm(label, ()))), settings(entry["chosen"]))
        for label, entry in stored.items()
    ]
    return table(("rehearsal", *MEASURES, "chosen"), rows)


def measured(entry: Mapping[str, Any], runs: Sequence[Result]) -> tuple[str, ...]:
    """What `MEASURES` names, in percent and bytes."""
    means = (f"{average(runs, metric):.1f}" for metric in ("forgetting_max", "learning"))
    return final(runs), *means, f"{entry['bytes']:,}"


def settings(words: Sequence[str]) -> str:
    """Chosen words without the groups that they belong to."""
    pairs = (word.partition("=") for word in words)
    return " ".join(f"{name.rpartition('.')[2]}={value}" for name, _, value in pairs)


def average(runs: Sequence[Result], metric: str) -> float:
    """Mean over seeds, in percent."""
    return 100 * fmean(run.metrics[metric] or 0.0 for run in runs)


def final(runs: Sequence[Result]) -> str:
    """Mean and standard deviation of final accuracy over seeds, in percent."""
    return spread([100 * (run.metrics["final"] or 0.0) for run in runs], ".1f")


def main() -> None:
    """Run what is not done, then write the page."""
    given = Projection.options(__doc__).parse_args()
    import_from_here()
    study, tables = Projection.of(given), {}
    for stream in STREAMS:
        path = study.out / stream / "table.json"
        if not given.page_only:
            entries = without_rehearsal(study, stream)
            with_rehearsal(study, stream, entries)
            write_text(path, json.dumps(entries, indent=1) + "\n")
        tables[stream] = json.loads(path.read_text())
    study.write(page(study, tables))


if __name__ == "__main__":
    main()
