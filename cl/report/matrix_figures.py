"""Figures of one strategy: R as a heatmap, and how each domain is remembered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl.report.axes import (
    INK,
    MUTED,
    colormap,
    dress,
    experience_ticks,
    is_dark,
    label_ends,
    new_figure,
    order_colours,
    whole_ticks,
)
from cl.report.curves import Band, Matrix, SectionView, StrategyView
from cl.report.labels import short, shorts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PRINTED = 12
"""Domains up to which the values fit into the cells."""

MAX_NAMED = 40
"""Names up to which every row or column of a heatmap is labelled."""

MAX_DRAWN_BANDS = 6
"""Domains up to which intervals are drawn around the curves; more would cover each other."""

UNSEEN_ALPHA = 0.28


def heatmap(view: SectionView, strategy: StrategyView) -> Figure:
    """R as a heatmap, averaged over seeds; cells of domains not taught yet are pale and lie right of the stair."""
    matrix = strategy.matrices[0]
    R, rows, seen = with_start(matrix, view.section.measure)
    num_rows, num_domains = R.shape
    label_width = 0.075 * min(max(map(len, rows)), 20) if num_rows <= MAX_NAMED else 0.4
    width = min(max(1.4 + label_width + 0.6 * num_domains, 4.2), 11)
    height = min(max(1.9 + 0.4 * num_rows, 2.5), 10)
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    unit = view.unit
    low, high = value_range(view)
    values = R * unit.factor
    colours = colormap(unit)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        vmin=low,
        vmax=high,
        alpha=np.where(seen, 1.0, UNSEEN_ALPHA),
        aspect="auto",
        interpolation="nearest",
    )
    dress(axes, grid="")
    figure.suptitle(short(strategy.label, 60), fontsize=10, color=INK, x=0.01, ha="left", parse_math=False)
    axes.set_title(f"{unit.name.lower()}, {matrix.name}", fontsize=8, color=MUTED, loc="left", pad=6)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#f1f2f4")
    _name_ticks(axes.xaxis, view.section.domains, "evaluated on", rotate=True)
    _name_ticks(axes.yaxis, rows, "after training on")
    if max(R.shape) <= MAX_NAMED:
        axes.set_xticks(np.arange(num_domains + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(num_rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
    _draw_stair(axes, seen)
    if num_domains <= MAX_PRINTED and num_rows <= MAX_PRINTED + 1:
        for (i, j), value in np.ndenumerate(values):
            if math.isnan(value):
                continue
            background = colours((value - low) / (high - low) if high > low else 1.0)
            colour = ("white" if is_dark(background) else INK) if seen[i, j] else MUTED
            axes.text(j, i, f"{value:.{unit.digits}f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=24)
    bar.set_label(f"{unit.axis}, {unit.direction}" if num_rows > 4 else unit.symbol, fontsize=8, color=MUTED)
    bar.ax.tick_params(labelsize=7, colors=MUTED, length=2)
    bar.outline.set_visible(False)
    return figure


def forgetting_curves(view: SectionView) -> Figure:
    """One panel per strategy, one line per domain; naive behind it in grey and joint as a level."""
    panels = [strategy for strategy in view.strategies if not strategy.is_bound] or view.strategies
    num_columns = min(len(panels), 3 if len(panels) in (3, 5, 6, 9) else 4)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = new_figure(max(3.5 * num_columns + 0.9, 5.2), 2.75 * num_rows + 0.5)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    num_domains = len(view.section.domains)
    colours = order_colours(num_domains)
    naive, joint = view.find("naive"), view.find("joint")
    for axes, strategy in zip(grid.flat, panels, strict=False):
        dress(axes, short(strategy.label, 40))
        if naive and strategy is not naive and not naive.is_bound:
            _draw_behind(axes, view, naive)
        if joint and joint.is_bound:
            level = joint.average.mean[-1] * view.unit.factor
            axes.plot([1, view.num_experiences], [level, level], color="#4D4D4D", lw=1, ls=(0, (4, 3)), zorder=1)
        for j, curve in enumerate(strategy.curves):
            draw_domain(axes, view, strategy.matrices[0], j, curve, colours[j])
    first = min(curve.x[0] for strategy in panels for curve in strategy.curves)
    _fit_height(grid.flat[0], view)
    for axes, strategy in zip(grid.flat, panels, strict=False):
        experience_ticks(axes, first, view.num_experiences)
        if num_domains <= MAX_PRINTED:
            taught = [j for j in range(num_domains) if strategy.matrices[0].seen[:, j].any()]
            curves = [(j, strategy.curves[j]) for j in taught]
            since = [int(np.argmax(strategy.matrices[0].seen[:, j])) - len(strategy.matrices[0].seen) for j in taught]
            means = [np.array(c.mean)[k:] for k, (_, c) in zip(since, curves, strict=True)]
            last = [running_mean(mean, view.smoothing)[-1] * view.unit.factor for mean in means]
            ends = [(c.x[-1], y, str(j), colours[j]) for (j, c), y in zip(curves, last, strict=True)]
            label_ends(axes, ends, size=7, offset=4)
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < len(panels))
        # shared axes write their ticks only in the last row, which may end early
        axes.tick_params(labelbottom=index + num_columns >= len(panels))
    figure.supxlabel("experiences seen", fontsize=9, color=MUTED)
    figure.supylabel(f"{view.unit.axis}, {view.unit.direction}", fontsize=9, color=MUTED)
    figure.suptitle(_curves_title(view, naive, joint), fontsize=10, color=INK, x=0.01, ha="left")
    if num_domains > MAX_PRINTED:
        _order_bar(figure, grid, num_domains)
    return figure


def draw_domain(axes: Axes, view: SectionView, matrix: Matrix, j: int, curve: Band, colour: Any) -> None:
    """One domain from its first visit on; for a loss also, faintly, what the model knew of it before."""
    x, y = np.array(curve.x), np.array(curve.mean) * view.unit.factor
    taught = np.flatnonzero(matrix.seen[:, j])
    start = int(taught[0]) + 1 if taught.size else x[-1] + 1
    many = len(view.section.domains) > MAX_PRINTED
    before, after = x <= start, x >= start
    window = view.smoothing
    if window > 1:
        axes.plot(x[after], y[after], color=colour, lw=0.4, alpha=0.12)
    if view.section.measure == "loss":
        axes.plot(x[before], y[before], color=colour, lw=0.8, alpha=0.15 if many else 0.4)
    marker: Any = {"marker": "o", "markersize": 2.8} if view.num_experiences <= 20 else {}
    width, alpha = (0.9, 0.8) if many else (1.6, 1.0)
    axes.plot(x[after], running_mean(y[after], window), color=colour, lw=width, alpha=alpha, **marker)
    low, high = (np.array(ends) * view.unit.factor for ends in (curve.low, curve.high))
    if len(view.section.domains) <= MAX_DRAWN_BANDS and window == 1 and not np.isnan(low[after]).all():
        axes.fill_between(x[after], low[after], high[after], color=colour, alpha=0.16, lw=0)


def running_mean(values: Any, window: int) -> Any:
    """Mean of each value and the `window - 1` before it; of as many as there are, at the start.

    Example:
        >>> running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist()
        [1.0, 2.0, 4.0, 6.0]
    """
    known = ~np.isnan(values)
    total, count = (np.cumsum(np.concatenate([[0.0], each])) for each in (np.where(known, values, 0.0), known))
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    count = count[1:] - count[first]
    return np.where(count > 0, (total[1:] - total[first]) / np.maximum(count, 1), np.nan)


def value_range(view: SectionView) -> tuple[float, float]:
    """One colour range for all strategies: 0 to 100 % for accuracies, what occurs after training for losses."""
    if view.section.measure == "accuracy":
        return 0.0, view.unit.factor
    found = np.concatenate([s.matrices[0].R[s.matrices[0].seen] for s in view.strategies])
    found = found[~np.isnan(found)] * view.unit.factor
    return (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)


def with_start(matrix: Matrix, measure: str) -> tuple[Any, list[str], Any]:
    """R, its row names and `seen`; a loss gets the row before training, since a language model comes with knowledge."""
    if measure != "loss" or np.isnan(matrix.init).all():
        return matrix.R, matrix.rows, matrix.seen
    start = np.zeros((1, matrix.R.shape[1]), dtype=bool)
    return np.vstack([matrix.init, matrix.R]), ["before training", *matrix.rows], np.vstack([start, matrix.seen])


def _fit_height(axes: Axes, view: SectionView) -> None:
    """Height for what was trained on; a loss before training may be far off, and would leave no room for the rest."""
    values = [s.matrices[0].R[s.matrices[0].seen] for s in view.strategies]
    for strategy in view.strategies:
        for j, curve in enumerate(strategy.curves):
            seen = strategy.matrices[0].seen[:, j]
            values += [np.array(end)[-len(seen) :][seen] for end in (curve.low, curve.high)]
    found = np.concatenate(values) * view.unit.factor
    found = found[~np.isnan(found)]
    if found.size:
        pad = 0.06 * (float(np.ptp(found)) or 1.0)
        axes.set_ylim(float(found.min()) - pad, float(found.max()) + pad)


def _draw_behind(axes: Axes, view: SectionView, naive: StrategyView) -> None:
    if len(naive.curves) > MAX_PRINTED:
        axes.plot(naive.average.x, np.array(naive.average.mean) * view.unit.factor, color="#9a9a9a", lw=1.4, zorder=1)
        return
    for j, curve in enumerate(naive.curves):
        taught = np.flatnonzero(naive.matrices[0].seen[:, j])
        x, y = np.array(curve.x), np.array(curve.mean) * view.unit.factor
        after = x > taught[0] if taught.size else x < 0
        axes.plot(x[after], running_mean(y[after], view.smoothing), color="#bdbdbd", lw=0.9, zorder=1)


def _draw_stair(axes: Axes, seen: Any) -> None:
    """The border between domains taught and not taught yet."""
    # one line with gaps: an object per step would be slow for long streams
    x, y = [], []
    for i, j in zip(*np.nonzero(seen), strict=True):
        if j + 1 < seen.shape[1] and not seen[i, j + 1]:
            x += [j + 0.5, j + 0.5, math.nan]
            y += [i - 0.5, i + 0.5, math.nan]
        if i > 0 and not seen[i - 1, j]:
            x += [j - 0.5, j + 0.5, math.nan]
            y += [i - 0.5, i - 0.5, math.nan]
    axes.plot(x, y, color=INK, lw=1, solid_capstyle="butt", scalex=False, scaley=False)


def _name_ticks(axis: Any, names: Sequence[str], label: str, rotate: bool = False) -> None:
    axis.set_label_text(label)
    if len(names) > MAX_NAMED:
        axis.set_ticks(whole_ticks(0, len(names) - 1))
        axis.set_label_text(f"{label} (number)")
        return
    texts = shorts(names, 20)
    turned = rotate and max(map(len, texts)) * len(texts) > 60
    style = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axis.set_ticks(range(len(names)), texts, parse_math=False, fontsize=8 if len(names) <= 20 else 6, **style)


def _order_bar(figure: Figure, grid: Any, num_domains: int) -> None:
    """A colour bar in place of a legend that nobody could read."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(0, num_domains - 1), ListedColormap(order_colours(num_domains)))
    bar = figure.colorbar(scale, ax=grid.ravel().tolist(), shrink=0.8, pad=0.01, aspect=30)
    bar.set_label("domain, in the order of the stream", fontsize=8, color=MUTED)
    bar.set_ticks(whole_ticks(0, num_domains - 1))
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    bar.outline.set_visible(False)


def _curves_title(view: SectionView, naive: StrategyView | None, joint: StrategyView | None) -> str:
    is_many = len(view.section.domains) > MAX_PRINTED
    parts = ["One line per domain" if is_many else "One line per domain, by number"]
    if view.smoothing > 1:
        parts.append(f"mean of the last {view.smoothing} experiences")
    if naive and not naive.is_bound and len(view.strategies) > 1:
        parts.append("grey: mean of naive" if is_many else "grey: naive")
    if joint and joint.is_bound:
        parts.append("dashed: joint")
    return ";  ".join(parts)
