"""The first domains inside experiences: how deep they fall before they recover."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cl.report.axes import INK, MUTED, dress, label_ends, new_figure, order_colours
from cl.report.curves import SectionView
from cl.report.labels import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inside_experiences(view: SectionView) -> Figure:
    """One panel per strategy, one line per domain over optimizer steps; experiences end at the vertical lines."""
    panels = [(strategy, strategy.within) for strategy in view.strategies if strategy.within]
    num_columns = min(len(panels), 2)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = new_figure(5.4 * num_columns + 0.5, 2.1 * num_rows + 0.7)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    colours = order_colours(len(view.domains_within))
    for axes, (strategy, found) in zip(grid.flat, panels, strict=False):
        dress(axes, short(strategy.label, 40))
        steps, is_end = np.array(found.steps), np.array(found.is_end)
        for end in found.ends:
            axes.axvline(end, color="#c9ced4", lw=0.8, zorder=1)
        for values, colour in zip(found.values * view.unit.factor, colours, strict=True):
            axes.plot(steps, values, color=colour, lw=1.3, zorder=3)
            axes.plot(steps[is_end], values[is_end], "o", color=colour, markersize=3, zorder=4)
        axes.margins(x=0.01)
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < len(panels))
        # shared axes write their ticks only in the last row, which may end early
        axes.tick_params(labelbottom=index + num_columns >= len(panels))
    for axes, (_, found) in zip(grid.flat, panels, strict=False):
        ends = zip(found.values[:, -1] * view.unit.factor, view.domains_within, colours, strict=True)
        label_ends(axes, [(found.steps[-1], y, str(j), colour) for y, j, colour in ends], size=7, offset=4)
    figure.supxlabel("optimizer steps", fontsize=9, color=MUTED)
    figure.supylabel(f"{view.unit.axis}, {view.unit.direction}", fontsize=9, color=MUTED)
    is_mean = any(found.num_seeds > 1 for _, found in panels)
    title = _title(len(view.domains_within), is_mean, separator="\n" if num_columns == 1 else ";  ")
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    return figure


def _title(count: int, is_mean: bool, separator: str) -> str:
    which = "The first domain" if count == 1 else f"The first {count} domains, by number,"
    mean = ", mean over seeds" if is_mean else ""
    return f"{which} inside experiences{mean}{separator}vertical lines: ends of experiences"
