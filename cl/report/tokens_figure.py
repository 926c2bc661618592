"""Losses over tokens, and under them the learning rate that brought them about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cl.report.axes import INK, MUTED, dress, label_ends, new_figure, order_colours
from cl.report.curves import SectionView
from cl.report.labels import short, shorts
from cl.report.style import scale_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def over_tokens(view: SectionView) -> Figure:
    """One column per strategy: a line per domain over tokens, below it the schedule; experiences end at the lines."""
    panels = [(strategy, strategy.tokens) for strategy in view.strategies if strategy.tokens][:4]
    figure = new_figure(4.6 * len(panels) + 0.8, 4.4)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    size, prefix = scale_of(max(found.tokens[-1] for _, found in panels), 1000)
    colours = order_colours(len(view.section.domains))
    for (above, below), (strategy, found) in zip(grid.T, panels, strict=True):
        dress(above, short(strategy.label, 40))
        dress(below)
        x = np.array(found.tokens) / size
        for end in found.ends:
            for axes in (above, below):
                axes.axvline(end / size, color="#c9ced4", lw=0.8, zorder=1)
        ends = []
        names = shorts(view.section.domains, 14)
        for j, (values, colour) in enumerate(zip(found.values, colours, strict=True)):
            known = ~np.isnan(values)
            if not known.any():
                continue
            above.plot(x[known], values[known], color=colour, lw=1.3, marker="o", markersize=2.5, zorder=3)
            ends.append((x[known][-1], values[known][-1], f"{j} {names[j]}", colour))
        below.plot(np.array(found.rate_at) / size, found.rate, color=MUTED, lw=1.2)
        below.set_ylim(bottom=0)
        above.margins(x=0.01)
        label_ends(above, ends, size=7, offset=4)
    grid[0][0].set_ylabel(f"{view.unit.axis}, {view.unit.direction}", fontsize=9, color=MUTED)
    grid[1][0].set_ylabel("learning rate", fontsize=9, color=MUTED)
    figure.supxlabel(
        f"tokens trained on ({prefix.strip()})" if prefix else "tokens trained on", fontsize=9, color=MUTED
    )
    mean = ", mean over seeds" if any(found.num_seeds > 1 for _, found in panels) else ""
    title = f"Loss on each domain over tokens{mean}; vertical lines: ends of experiences"
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    return figure
