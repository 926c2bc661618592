"""Retention against the time since last practice, in log-log coordinates with the fitted power law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl.report.axes import INK, dress, height_in_points, new_figure, write
from cl.report.curves import SectionView
from cl.report.labels import short, spread
from cl.report.revisit import law_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5)), "dashdot": (0, (4, 1.5, 1, 1.5))}


def revisits(view: SectionView) -> Figure:
    """One cloud per strategy, its law as a line; the larger a point, the more pairs are behind it."""
    known = [(strategy, strategy.revisit) for strategy in view.strategies if strategy.revisit]
    figure = new_figure(8.2, 4.4)
    axes = figure.add_subplot()
    unit = view.unit
    dress(axes, "", "experiences since last practice (log)", f"{unit.axis} (log), {unit.direction}", grid="both")
    axes.set_xscale("log")
    axes.set_yscale("log")
    most = max(int(found.count.max()) for _, found in known)
    last = max(int(found.lag[-1]) for _, found in known)
    ends = []
    for strategy, found in known:
        colour, shown = strategy.look.colour, found.value > 0
        size = 8 + 70 * (found.count / most) ** 0.5
        value = found.value * unit.factor
        axes.scatter(found.lag[shown], value[shown], s=size[shown], color=colour, alpha=0.45, lw=0, zorder=3)
        if found.law.is_defined:
            x = np.geomspace(1, found.lag[-1], 50)
            y = found.law.at(x) * unit.factor
            axes.plot(x, y, color=colour, lw=1.8, ls=LINE_STYLES[strategy.look.dash], zorder=4)
            text = f"{short(strategy.label)}: {law_text(found)}"
            ends.append((float(x[-1]), float(y[-1]), text, colour))
        elif shown.any():
            ends.append((float(found.lag[shown][-1]), float(value[shown][-1]), short(strategy.label), colour))
    axes.set_xlim(0.9, last * 1.1)
    _label_ticks(axes)
    axes.minorticks_off()
    _name_lines(axes, ends)
    figure.suptitle(
        "What is left since last practice: points are means, larger ones of more pairs; lines are fitted power laws",
        fontsize=10,
        color=INK,
        x=0.01,
        ha="left",
    )
    return figure


def _name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Names right of the lines, moved apart; `axes.label_ends` would measure the gaps on a linear axis."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    height = height_in_points(axes)
    places = [(math.log(y) - low) / (high - low) * height for _, y, _, _ in ends]
    for (x, y, text, colour), place, at in zip(ends, places, spread(places, 10, 0, height), strict=True):
        is_moved = abs(at - place) > 4
        write(axes, text, (x, y), (6 + 4 * is_moved, at - place), colour, has_leader=is_moved)


def _label_ticks(axes: Axes) -> None:
    """Plain numbers at 1, 2, 5, 10, ... on both axes; an axis within one octave would otherwise have none."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # there is no half experience
    for axis, subs in ((axes.xaxis, (1, 2, 3, 5, 7)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(base=10, subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
