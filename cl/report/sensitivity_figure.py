"""How modules react to a new experience: their change over the run, and their ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cl.metrics.sensitivity import Change, ranked
from cl.report.axes import INK, MUTED, dress, new_figure, order_colours
from cl.report.labels import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def module_sensitivity(changes: Sequence[Change], values: Mapping[str, float], snapshot_steps: int) -> Figure:
    """Left: mean change per weight of each module over the steps of the run. Right: switch over late, ranked.

    Args:
        changes: in the order of the run.
        values: name -> S_l.
    """
    names = ranked(values)
    colours = dict(zip(names, order_colours(len(names)), strict=True))
    figure = new_figure(9.6, max(3.4, 1.4 + 0.24 * len(names)), wspace=0.04)
    course, bars = figure.subplots(1, 2, width_ratios=[5.4, 3.6])
    dress(course, "Change of a weight between snapshots", "steps with a whole interval", "mean absolute change")
    steps = [(number + 1) * snapshot_steps for number in range(len(changes))]
    for number, change in enumerate(changes):
        if change.interval == 0 and change.experience > 0:
            course.axvline(steps[number] - snapshot_steps, color="#c9ced4", lw=0.8, zorder=1)
    for name in names:
        course.plot(steps, [change.by_name.get(name, math.nan) for change in changes], color=colours[name], lw=1.2)
    course.set_yscale("log")
    course.margins(x=0.01)
    dress(bars, "Sensitivity: after a switch / late", grid="x")
    finite = [values[name] for name in names if math.isfinite(values[name])]
    longest = max(finite, default=1.0)
    for row, name in enumerate(names):
        length = min(values[name], longest)
        bars.barh(row, length, color=colours[name], height=0.7)
        bars.annotate(f"{values[name]:.3g}", (length, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    bars.set_yticks(range(len(names)), [short(name or "(model)", 28) for name in names], fontsize=8, color=INK)
    bars.set_ylim(len(names) - 0.4, -0.6)
    bars.set_xlim(0, longest * 1.18)
    figure.supxlabel("vertical lines: a new experience begins", fontsize=8, color=MUTED, x=0.01, ha="left")
    return figure
