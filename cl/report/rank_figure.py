"""Average ranks as a critical-difference diagram (Demšar 2006)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from cl.report.axes import INK, MUTED, new_figure, readable
from cl.report.curves import SectionView
from cl.report.labels import shorts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2
ROW, BAR = 17, 7
"""Points between names, and between the bars of groups."""


def average_ranks(view: SectionView) -> Figure:
    """Best left; names hang from their rank, a bar joins what is not told apart."""
    ranks = view.ranks
    assert ranks is not None
    k = len(ranks.average)
    half = (k + 1) // 2
    names = dict(zip(ranks.average, shorts(list(ranks.average)), strict=True))
    # all lengths are in points, so that text has its room whatever the number of strategies
    sides = list(names.values())[:half], list(names.values())[half:]
    left, right = (5.2 * max(map(len, side)) + 51 for side in sides)
    # the critical difference lies above the axis
    axis = 34 if ranks.has_enough_seeds else 16
    first_row = axis + 10 + BAR * len(ranks.groups) + 12
    height = first_row + ROW * half
    note = textwrap.wrap(ranks.sentence, 108)
    figure = new_figure(WIDTH, (height + 11 * len(note) + 50) / 72)
    axes = figure.add_subplot()
    axes.set_axis_off()
    scale = (WIDTH * 72 - 20 - left - right) / (k - 1)
    axes.set_xlim(1 - left / scale, k + right / scale)
    axes.set_ylim(height, 0)
    axes.set_title(
        f"Average rank by final {view.unit.name.lower()}, 1 is best", fontsize=10, color=INK, loc="left", pad=12
    )
    axes.plot([1, k], [axis, axis], color="#b4bac1", lw=1)
    for value in range(1, k + 1):
        axes.plot([value, value], [axis - 4, axis], color="#b4bac1", lw=1)
        axes.text(value, axis - 7, str(value), ha="center", va="bottom", fontsize=8, color=MUTED)
    if ranks.has_enough_seeds:
        _draw_difference(axes, ranks.critical_difference)
    for index, (label, average) in enumerate(ranks.average.items()):
        # the outermost names are the highest, so that no line crosses another
        is_left = index < half
        y = first_row + ROW * (index if is_left else k - 1 - index)
        side, at = (-1, 1 - 6 / scale) if is_left else (1, k + 6 / scale)
        colour = view_colour(view, label)
        axes.plot([average, average, at], [axis, y, y], color=colour, lw=1.1, solid_joinstyle="round")
        axes.plot([average], [axis], "o", color=colour, markersize=4.5)
        ends = {"ha": "right" if is_left else "left", "va": "center", "fontsize": 8.5, "parse_math": False}
        axes.text(at + side * 5 / scale, y, f"{average:.2f}", color=MUTED, **ends)
        # from rank 10 on a digit more
        name_at = at + side * (29 if max(ranks.average.values()) < 9.995 else 34) / scale
        axes.text(name_at, y, names[label], color=readable(colour), **ends)
    for index, group in enumerate(ranks.groups):
        y = axis + 10 + BAR * index
        low, high = ranks.average[group[0]] - 4 / scale, ranks.average[group[-1]] + 4 / scale
        axes.plot([low, high], [y, y], color=INK, lw=3, solid_capstyle="butt", zorder=4)
    figure.supxlabel("\n".join(note), fontsize=8, color=MUTED, x=0.01, ha="left")
    return figure


def view_colour(view: SectionView, label: str) -> str:
    """The colour of a strategy in every figure."""
    return next(strategy.look.colour for strategy in view.strategies if strategy.label == label)


def _draw_difference(axes: Axes, difference: float) -> None:
    """The length that two ranks must be apart."""
    axes.plot([1, 1 + difference], [11, 11], color=INK, lw=1.2)
    for end in (1, 1 + difference):
        axes.plot([end, end], [8, 14], color=INK, lw=1.2)
    text = f"critical difference {difference:.2f}"
    axes.text(1 + difference / 2, 6, text, ha="center", va="bottom", fontsize=8, color=INK)
