"""`cl explain sensitivity=STEPS`: which modules react most when a new experience begins; what `fpf` selects by.

Trains the whole run silently, comparing the weights every STEPS steps, and prints the mean change of a weight in the
first interval after a switch, in late intervals (the second half of an experience), and their ratio. `figure=FILE.png`
also draws it. The equation is in cl/metrics/sensitivity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from cl.cli import build
from cl.cli.compose import composed, import_from_here, plain
from cl.cli.folder import check_writable
from cl.core import Batch, Output, Setting, UserError
from cl.hooks import Strategy
from cl.metrics.sensitivity import Change, mean_change, module_of, ranked, sensitivity
from cl.setup import experience_steps
from cl.state import TrainState

OPTIONS = ("sensitivity", "figure")


class Snapshots(Strategy):
    """Last in the chain: compares the weights with those of the last snapshot; changes nothing.

    Args:
        every: steps between snapshots, counted from the start of each experience.
    """

    settings = frozenset(Setting)

    def __init__(self, every: int) -> None:
        self.every = every
        self.changes: list[Change] = []
        self.by_module: list[Change] = []

    def on_experience_start(self, state: TrainState) -> None:
        self.start, self.before = state.step, _weights(state)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        steps = state.step - self.start
        if steps % self.every:
            return
        now, place = _weights(state), (state.experience.id, steps // self.every - 1)
        self.changes.append(Change(*place, mean_change(self.before, now)))
        self.by_module.append(Change(*place, mean_change(self.before, now, module_of)))
        self.before = now

    @property
    def late_from(self) -> int:
        """First interval of the second half of the shortest experience."""
        last: dict[int, int] = {}
        for change in self.changes:
            last[change.experience] = max(change.interval, last.get(change.experience, 0))
        return max(1, (min(last.values(), default=0) + 1) // 2)


def _weights(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in state.parameters().items()}


def main(words: list[str]) -> int:
    """Measure the sensitivity of every parameter and module over one run."""
    import_from_here()
    options = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.partition("=")[0] in OPTIONS}
    steps = options["sensitivity"]
    if not steps.isdigit() or int(steps) < 1:
        raise UserError(f"sensitivity is {steps!r}; it must be a number of steps between snapshots, at least 1")
    path = Path(options.get("figure", ""))
    if options.get("figure"):
        _check_figure(path)
    overrides = [word for word in words if word.partition("=")[0] not in OPTIONS]
    snapshots = measured(plain(composed("run", overrides)), int(steps))
    show(Console(markup=False), snapshots)
    if options.get("figure"):
        from cl.report.axes import DPI
        from cl.report.sensitivity_figure import module_sensitivity

        path.parent.mkdir(parents=True, exist_ok=True)
        values = sensitivity(snapshots.changes, snapshots.late_from)
        module_sensitivity(snapshots.changes, values, snapshots.every).savefig(path, dpi=DPI)
        print(f"figure: {path}")
    return 0


def _check_figure(path: Path) -> None:
    """Refuse what could not be drawn, before a whole run is trained for it."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:].lower() not in (kinds := FigureCanvasBase.get_supported_filetypes()) or path.is_dir():
        raise UserError(
            f"figure is {str(path)!r}; it must be a file that ends in {', '.join(f'.{kind}' for kind in kinds)}"
        )
    check_writable(path.parent)


def measured(config: dict[str, Any], every: int) -> Snapshots:
    """Train a run and follow its weights.

    Raises:
        UserError: there is no switch to react to, or no experience is long enough.
    """
    trainer = build.make_trainer(config, {}, run_dir=None, observers=())
    experiences = trainer.state.stream.experiences
    if len(experiences) < 2:
        raise UserError(f"sensitivity needs a switch between experiences, and the stream has {len(experiences)}")
    longest = min(experience_steps(trainer.state.stream, trainer.config))
    if 2 * every > longest:
        raise UserError(
            f"sensitivity is {every}; it must be at most {longest // 2}, half of the steps of the shortest experience"
        )
    snapshots = Snapshots(every)
    trainer.compose([*trainer.strategies, snapshots])
    trainer.run()
    return snapshots


def show(console: Console, snapshots: Snapshots) -> None:
    """Print the ranking of parameters, then that of modules."""
    for title, changes in (("parameters", snapshots.changes), ("modules", snapshots.by_module)):
        values = sensitivity(changes, snapshots.late_from)
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "after a switch", "late", "sensitivity"):
            table.add_column(column)
        for name in ranked(values):
            first = _mean([c for c in changes if c.experience > 0 and c.interval == 0], name)
            late = _mean([c for c in changes if c.interval >= snapshots.late_from], name)
            table.add_row(name or "(the model itself)", f"{first:.3g}", f"{late:.3g}", f"{values[name]:.1f}")
        console.print(table)


def _mean(changes: Sequence[Change], name: str) -> float:
    return sum(change.by_name[name] for change in changes) / len(changes)
