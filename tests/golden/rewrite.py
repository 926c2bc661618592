"""Record the first losses and R of a few toy runs in plain text, and show what changed (`make golden`).

A change that claims "no numerical effect" proves it by leaving these files as they are. They are compared with a
relative tolerance and not bit for bit, because CPUs with other vector units sum in another order: perturbing every
logit by half a unit in the last place moves these losses by at most 3e-7.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cl.core import Setting
from cl.testing import Plugin, train

FOLDER = Path(__file__).resolve().parent
NUM_LOSSES, STEPS_PER_EXPERIENCE = 20, 10
"""Half of the losses are from the second experience, where strategies begin to act."""
LOSS_TOLERANCE = 1e-6
ACCURACY_TOLERANCE = 1.01 / 96
"""One row of the toy stream's 96: a logit may fall on the other side."""

TIL, CIL, DIL = Setting.TASK_INCREMENTAL, Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL


class Golden(NamedTuple):
    """One recorded run. Arguments are given in full, so that tuning a contract's toy form does not change a record."""

    strategy: str
    setting: Setting
    arguments: dict[str, Any]

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.strategy}-{self.setting}.txt"


GOLDENS = [
    Golden("naive", TIL, {}),
    Golden("naive", CIL, {}),
    Golden("naive", DIL, {}),
    Golden("replay", CIL, {"capacity": 50}),
    Golden("derpp", TIL, {"capacity": 50, "alpha": 0.5, "beta": 1.0}),
    Golden("agem", DIL, {"capacity": 60, "replay_batch_size": 16}),
    Golden("gem", CIL, {"capacity": 30}),
    Golden("ewc", DIL, {"strength": 10.0}),
    Golden("si", DIL, {"strength": 1.0}),
    Golden("mas", TIL, {"strength": 0.1}),
    Golden("lwf", TIL, {"strength": 1.0}),
    Golden("cumulative", CIL, {}),
]


def recorded(golden: Golden) -> str:
    """The text of a run: what was asked for, then `loss STEP VALUE` and `R EXPERIENCE VALUES` lines."""
    strategy = Plugin(golden.strategy, "strategies").load()(**golden.arguments)
    run = train(golden.setting, [strategy], epochs=None, max_steps=STEPS_PER_EXPERIENCE)
    lines = [f"# {golden.strategy} {golden.arguments} on the {golden.setting} toy stream, seed 0"]
    lines += [f"loss {step} {value:.9g}" for step, value in enumerate(run.losses[:NUM_LOSSES])]
    lines += [f"R {i} {' '.join(f'{value:.6f}' for value in row)}" for i, row in enumerate(run.result.R)]
    return "\n".join(lines) + "\n"


def differences(old: str, new: str) -> list[str]:
    """Lines in which two records differ by more than another CPU could explain."""
    found = []
    for left, right in zip(_lines(old), _lines(new), strict=True):
        (kind, number, *values), (other_kind, other_number, *others) = left, right
        if (kind, number, len(values)) != (other_kind, other_number, len(others)):
            return [f"{left} became {right}"]
        for a, b in zip(map(float, values), map(float, others), strict=True):
            allowed = LOSS_TOLERANCE * abs(a) if kind == "loss" else ACCURACY_TOLERANCE
            if abs(a - b) > allowed:
                found.append(f"{kind} {number}: {a} became {b}")
    return found


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if not line.startswith("#")]


def main() -> None:
    """Rewrite every file that differs, whatever by, and print the differences."""
    torch.set_num_threads(1)
    changed = 0
    for golden in GOLDENS:
        old, new = golden.path.read_text() if golden.path.exists() else "", recorded(golden)
        if old != new:
            changed += 1
            name = golden.path.name
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, name, n=0))
            golden.path.write_text(new)
    for stray in set(FOLDER.glob("*.txt")) - {golden.path for golden in GOLDENS}:
        print(f"{stray.name} belongs to no run; removed")
        stray.unlink()
    print(f"{changed} of {len(GOLDENS)} golden files changed")


if __name__ == "__main__":
    main()
