"""Drawing with matplotlib without its global state: figures are objects, every style is set on its own axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl.report.labels import spread
from cl.report.style import GOODNESS, ORDER, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

DPI = 150
INK, MUTED, RULE = "#1f2328", "#6a737d", "#e3e6ea"


def new_figure(width: float, height: float, wspace: float = 0.02) -> Figure:
    """A figure of its own, in inches, drawn by Agg. `wspace`: share of the width left free between panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(wspace=wspace)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "", grid: Any = "y") -> None:
    """The common look: no box, faint grid behind the data, small muted ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b4bac1")
    axes.tick_params(colors=MUTED, labelsize=8, length=3, color="#b4bac1")
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    # names come from users, and matplotlib reads "$" as the start of a formula
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED, parse_math=False)


def colormap(unit: Unit) -> Colormap:
    """Dark is better, whatever the direction of the measure."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = GOODNESS if unit.higher_is_better else GOODNESS[::-1]
    return LinearSegmentedColormap.from_list("goodness", list(colours))


def order_colours(count: int) -> list[Any]:
    """One colour per domain in the order of the columns, early ones dark."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("order", list(ORDER))
    # the last part is too faint on white
    return [colours(0.88 * i / max(count - 1, 1)) for i in range(count)]


def experience_ticks(axes: Axes, first: int, last: int) -> None:
    """Whole numbers only, and no range of no width when there is a single experience."""
    axes.set_xticks(whole_ticks(first, last))
    pad = 0.5 if first == last else (last - first) * 0.03
    axes.set_xlim(first - pad, last + pad)


def whole_ticks(first: int, last: int) -> list[int]:
    """At most nine round whole numbers in [first, last]."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=8, integer=True, min_n_ticks=1).tick_values(first, last)
    return [round(value) for value in found if first <= value <= last]


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Any]], size: float = 8, offset: float = 6) -> None:
    """Write names to the right of the points where lines end, moved apart where they would touch.

    Args:
        ends: (x, y, text, colour) in data coordinates; an undefined y is skipped.
        offset: points between line and text.
    """
    known = [end for end in ends if not math.isnan(end[1])]
    low, high = axes.get_ylim()
    per_point = (high - low) / height_in_points(axes)
    for x in sorted({end[0] for end in known}):
        column = [end[1:] for end in known if end[0] == x]
        placed = spread([y for y, _, _ in column], size * 1.25 * per_point, low, high)
        for (y, text, colour), at in zip(column, placed, strict=True):
            is_moved = abs(at - y) > size * 0.5 * per_point
            write(axes, text, (x, y), (offset + 4 * is_moved, (at - y) / per_point), colour, size, has_leader=is_moved)


def write(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    offset: tuple[float, float],
    colour: Any,
    size: float = 8,
    has_leader: bool = False,
    align: str = "left",
) -> None:
    """Text beside a point, `offset` in points."""
    axes.annotate(
        text,
        xy=point,
        xytext=offset,
        textcoords="offset points",
        va="center",
        ha=align,
        fontsize=size,
        color=readable(colour),
        parse_math=False,
        annotation_clip=False,
        arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 1} if has_leader else None,
    )


def height_in_points(axes: Axes) -> float:
    """Height of the axes; before the layout only its share of the figure is known, which is near enough for text."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    assert place is not None
    return float(figure.get_figheight() * 72 * place.get_position(figure).height)


def readable(colour: Any) -> Any:
    """The colour as text on white: darkened until its contrast is at least 4.5."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    while 1.05 / (_luminance(rgb) + 0.05) < 4.5:
        rgb = rgb * 0.94
    return tuple(rgb)


def is_dark(rgba: Sequence[float]) -> bool:
    """Whether white text reads better on the colour than black text."""
    return _luminance(np.array(rgba[:3])) < 0.3


def _luminance(rgb: Any) -> float:
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
