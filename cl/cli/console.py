"""What a person sees: a line of progress while a run goes, a table of R when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cl.observe import Observer
from cl.result import Result
from cl.state import TrainState

MAX_COLUMNS = 10
"""Wider tables of R are cut to the first and last domains; as many fit into 80 characters."""

MAX_BOXED = 8
"""Domains up to which a table has a box."""

MAX_ROWS = 30
"""Longer tables of R are cut to the first and last experiences."""


class Pulse(Observer):
    """Tells `sink` how a run stands, a few times a second.

    The message: `done` and `total` optimizer steps, `experience` and `experiences`, `loss`, and the last `accuracy`
    (mean over the domains of the last row of R) where there is one.
    """

    def __init__(self, sink: Callable[[dict[str, Any]], None], every_s: float = 0.2) -> None:
        self.sink, self.every_s = sink, every_s
        self._last = 0.0
        self._message: dict[str, Any] = {}

    def on_start(self, result: Result, settings: Mapping[str, Any]) -> None:
        self._message = {"experiences": len(result.experiences), "measure": result.measure}

    def on_step(self, state: TrainState, losses: Mapping[str, float], lr: float) -> None:
        now = time.monotonic()
        if now - self._last < self.every_s:
            return
        self._last = now
        self._tell(state, loss=losses["loss"])

    def on_evaluation(self, state: TrainState, result: Result) -> None:
        seen = [result.R[-1][j] for j in set(result.trained[: len(result.R)]) if j >= 0]
        values = [value for value in seen or result.R[-1] if value is not None]
        self._tell(state, measured=sum(values) / len(values) if values else None)

    def _tell(self, state: TrainState, **news: Any) -> None:
        experience = state.experience.id + 1 if state.has_begun else 0
        self._message |= {"done": state.step, "total": state.total_steps, "experience": experience, **news}
        self.sink(dict(self._message))


def progress_line(message: Mapping[str, Any]) -> str:
    """The text beside a progress bar."""
    words = [f"experience {message.get('experience', 0)}/{message.get('experiences', '?')}"]
    if message.get("loss") is not None:
        words.append(f"loss {message['loss']:.3f}")
    if message.get("measured") is not None:
        is_loss = message.get("measure") == "loss"
        words.append(f"{message['measured']:.3f} nats" if is_loss else f"accuracy {100 * message['measured']:.1f}")
    return ", ".join(words)


def progress_bars(console: Console) -> Progress:
    """Bars with a name, the state of the run, and the time left."""
    return Progress(
        TextColumn("{task.fields[name]}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


def matrix_title(result: Result) -> str:
    """What `matrix_table` shows; a line of its own, since a table wraps its title at its own width."""
    measure = "loss in nats" if result.measure == "loss" else "accuracy in %"
    return f"{measure} on each domain after each experience"


def matrix_table(result: Result) -> Table:
    """R as a table: a row per experience trained, a column per domain measured."""
    is_loss = result.measure == "loss"
    shown = _shown(len(result.domains), MAX_COLUMNS)
    if len(shown) > MAX_BOXED:
        # without a box, so that all numbers fit
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("after", no_wrap=True, max_width=17)
    else:
        table = Table()
        table.add_column("after", no_wrap=True)
    for j in shown:
        # names give way to numbers where both do not fit
        table.add_column("…" if j is None else _heading(result, j), justify="right")
    for i in _shown(len(result.R), MAX_ROWS):
        if i is None:
            table.add_row(f"... {len(result.R) - MAX_ROWS} more")
            continue
        cells = ["" if j is None else _cell(result.R[i][j], is_loss) for j in shown]
        table.add_row(f"{i} {result.experiences[i]}", *cells)
    return table


def _shown(count: int, most: int) -> list[int | None]:
    """All numbers below `count`, or the first and last ones with None where some are left out."""
    if count <= most:
        return list(range(count))
    half = most // 2
    return [*range(half), None, *range(count - half, count)]


def _heading(result: Result, domain: int) -> str:
    """Number of a domain, or its name where the row of that number does not tell it: text that is only measured."""
    name = result.domains[domain]
    return str(domain) if result.experiences[domain : domain + 1] == [name] else name


def _cell(value: float | None, is_loss: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if is_loss else f"{100 * value:.1f}"


def metrics_line(result: Result) -> str:
    """The numbers that a comparison is about, in one line."""
    names = {"final": "final", "average": "average", "forgetting_max": "forgetting (max)", "bwt": "BWT", "fwt": "FWT"}
    if len(result.R) > MAX_ROWS:
        # a long stream swings from row to row, so that its last row says little
        names = {"late_average": "mean of the last fifth"} | names
    words = []
    for key, name in names.items():
        value = result.metrics.get(key)
        if value is not None and value == value:
            words.append(f"{name} {value:.3f}" if result.measure == "loss" else f"{name} {100 * value:.1f}")
    return ", ".join(words)


def ui_command(run_dir: Path, run_id: str, uri: str | None = None) -> str:
    """What shows the curves of a run; `uri` of its store where one was named."""
    from cl.tracking.check import without_password
    from cl.tracking.store import default_uri, store_of

    found = uri or store_of(run_dir, run_id)
    return "cl ui" if found == default_uri() else f"cl ui uri={without_password(found)}"
