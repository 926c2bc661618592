"""What the projection study runs: strategies and their grids, the bytes they keep, and rehearsal in these bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _study import Comparisons, finished

from cl.cli import build
from cl.cli.compose import composed, seeded
from cl.result import Result

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
FIVE_STEPS = ("inner_steps=5", "rates=[0.001,0.01]")  # as published
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
    arm("hebbian", *FIVE_STEPS),
    arm("rmn", words=WITH_ADAM, grid=ADAM),
    arm("weight_factorization", grid={**SGD, "strategy.weight_factorization.start": ("base", "merged")}),
    arm("recall_merge", grid={**SGD, "strategy.recall_merge.start": ("first", "merged")}),
    Arm("naive, spiking", ("strategy=naive", *SPIKING)),
    Arm("hebbian, spiking", (*arm("hebbian", *FIVE_STEPS).words, *SPIKING)),
)
REFERENCES = ("naive", "naive, spiking")


def stored(name: str, stream: str, num_bytes: int) -> Arm:
    """Rehearsal with as many rows as fit into so many bytes."""
    rows = num_bytes // ROW_BYTES[name][stream]
    return Arm(f"{name}, {rows} rows", (f"strategy={name}", f"strategy.{name}.capacity={rows}"))


@dataclass(frozen=True, kw_only=True)
class Projection(Comparisons):
    """The runs of the study."""

    out: Path = Path("runs/projection")
    page: Path = Path("docs/comparisons/projection")
    seeds: int = 5
    is_quick: bool = False

    @property
    def size(self) -> Sequence[str]:
        return QUICK if self.is_quick else SIZE

    def config(self, stream: str, arm: Arm, words: Iterable[str] = ()) -> Any:
        common = (*STREAMS[stream], f"data.root={self.data}", *COMMON)
        return composed("run", [*common, *arm.words, *self.size, *words])

    def folder(self, stream: str, arm: Arm) -> Path:
        return self.out / stream / arm.label.replace(", ", "-").replace(" ", "-")

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
            },
            "projection",
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
            },
            "projection",
        )

    def results(self, stream: str, arm: Arm) -> list[Result]:
        return finished(self.folder(stream, arm), "seed-*/result.json")

    def num_learnt(self, stream: str, arm: Arm) -> int:
        """Numbers that are trained."""
        model = build.make_trainer(seeded(self.config(stream, arm), 0), {}, run_dir=None, observers=()).state.model
        return sum(p.numel() for p in model.parameters())


def without_rehearsal(study: Projection, stream: str) -> dict[str, dict[str, Any]]:
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


def with_rehearsal(study: Projection, stream: str, entries: dict[str, dict[str, Any]]) -> None:
    """Run replay and derpp at the bytes of the others; notes in the entries which of them a strategy is set against."""
    groups: list[list[str]] = []
    rivals = [label for label in entries if label not in REFERENCES]
    for label in sorted(rivals, key=lambda each: entries[each]["bytes"]):
        is_near = groups and entries[label]["bytes"] < SHARED * entries[groups[-1][0]]["bytes"]
        groups[-1].append(label) if is_near else groups.append([label])
    budgets = [entries[group[0]]["bytes"] for group in groups]
    for name in ROW_BYTES:
        middle = stored(name, stream, budgets[len(budgets) // 2])
        study.tune(stream, [middle])
        words = study.chosen(stream, middle)
        arms = {num_bytes: stored(name, stream, num_bytes) for num_bytes in budgets}
        study.measure(stream, dict.fromkeys(arms.values(), words))
        for group, (num_bytes, arm) in zip(groups, arms.items(), strict=True):
            declared = max(result.cost["buffer_bytes"] for result in study.results(stream, arm))
            assert declared <= num_bytes, f"{arm.label} keeps {declared} bytes, not {num_bytes}"
            entries[arm.label] = {"chosen": words, "bytes": declared, "words": arm.words}
            for label in group:
                entries[label][name] = arm.label
