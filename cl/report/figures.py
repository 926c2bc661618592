"""Figures of a comparison, and the files of all figures."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl.report.axes import DPI, INK, dress, experience_ticks, label_ends, new_figure, write
from cl.report.comparison import NOT_CONTINUAL, Estimate
from cl.report.curves import COSTS, Cost, SectionView, StrategyView
from cl.report.labels import beside, shorts
from cl.report.matrix_figures import forgetting_curves, heatmap
from cl.report.rank_figure import average_ranks
from cl.report.revisit_figure import LINE_STYLES, revisits
from cl.report.style import scale_of
from cl.report.tokens_figure import over_tokens
from cl.report.within_figure import inside_experiences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_figures(view: SectionView, folder: Path) -> list[Path]:
    """Draw everything that a section has data for; one heatmap per strategy."""
    if not view.strategies:
        return []
    drawn: list[tuple[str, Any]] = [("comparison", comparison(view)), ("forgetting_curves", forgetting_curves(view))]
    if has_cost(view):
        drawn.append(("cost", cost(view)))
    if view.ranks:
        drawn.append(("ranks", average_ranks(view)))
    if any(strategy.within for strategy in view.strategies):
        drawn.append(("within", inside_experiences(view)))
    if any(strategy.tokens for strategy in view.strategies):
        drawn.append(("tokens", over_tokens(view)))
    if any(strategy.revisit for strategy in view.strategies):
        drawn.append(("revisit", revisits(view)))
    names = file_names([strategy.label for strategy in view.strategies])
    is_single = len(view.strategies) == 1
    for strategy in view.strategies:
        name = view.unit.matrix if is_single else f"{view.unit.matrix}_{names[strategy.label]}"
        drawn.append((name, heatmap(view, strategy)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn:
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def file_names(labels: list[str]) -> dict[str, str]:
    """A file name for each label, distinct even where labels differ only in characters that files cannot have.

    Example:
        >>> file_names(["derpp+refresh", "a/b", "a b"])
        {'derpp+refresh': 'derpp+refresh', 'a/b': 'a_b', 'a b': 'a_b_2'}
    """
    names: dict[str, str] = {}
    for label in labels:
        stem = re.sub(r"[^A-Za-z0-9+.=-]+", "_", label).strip("_.")[:80] or "strategy"
        name, count = stem, 1
        while name.lower() in {taken.lower() for taken in names.values()}:
            count += 1
            name = f"{stem}_{count}"
        names[label] = name
    return names


def comparison(view: SectionView) -> Figure:
    """The strategies side by side: the course over the stream, and where they end, with every seed."""
    has_forgetting = any(s.row.metrics["forgetting_max"].is_defined for s in view.strategies)
    has_dots = any(s.row.final.is_defined for s in view.strategies)
    widths = [5.4, *([3.0] if has_dots else []), *([2.6] if has_dots and has_forgetting else [])]
    height = max(3.6, 0.9 + 0.3 * len(view.strategies))
    figure = new_figure(sum(widths) + 0.6, height, wspace=0.06)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _draw_course(panels[0], view)
    keys = ["final", "forgetting_max"][: len(panels) - 1]
    for axes, key in zip(panels[1:], keys, strict=True):
        _draw_dots(axes, view, key, is_first=key == "final")
    return figure


def has_cost(view: SectionView) -> bool:
    """Whether any finished run recorded its work."""
    return any(not math.isnan(s.row.passes) and s.row.final.is_defined for s in view.strategies)


def cost(view: SectionView) -> Figure:
    """Final measure against work and against memory, with the front of those that nobody beats in both."""
    figure = new_figure(10.4, 4.0)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, against in zip(panels, COSTS, strict=True):
        _draw_cost(axes, view, against)
    return figure


def _draw_course(axes: Axes, view: SectionView) -> None:
    unit = view.unit
    dress(axes, f"{unit.name} over the domains seen so far", "experiences seen", f"{unit.axis}, {unit.direction}")
    last = view.num_experiences
    ends = []
    names = shorts([strategy.label for strategy in view.strategies])
    for strategy, name in zip(view.strategies, names, strict=True):
        band, look = strategy.average, strategy.look
        mean, low, high = (np.array(values) * unit.factor for values in (band.mean, band.low, band.high))
        x = np.array(band.x)
        if strategy.is_bound:
            # one row stands for the whole stream, so it is a level and not a point at the first experience
            x, mean, low, high = np.array([1, last]), *(np.repeat(values, 2) for values in (mean, low, high))
        style: Any = {"color": look.colour, "lw": 1.5 if look.is_neutral else 2, "ls": LINE_STYLES[look.dash]}
        marker: Any = {} if strategy.is_bound or last > 30 else {"marker": "o", "markersize": 3.5}
        axes.plot(x, mean, zorder=2 if look.is_neutral else 3, **style, **marker)
        if not np.isnan(low).all():
            axes.fill_between(x, low, high, color=look.colour, alpha=0.15, lw=0, zorder=1)
        name += "" if strategy.row.seeds else " (unfinished)"
        ends.append((float(x[-1]), float(mean[-1]), name, look.colour))
    experience_ticks(axes, 1, last)
    label_ends(axes, ends)


def _draw_dots(axes: Axes, view: SectionView, key: str, is_first: bool) -> None:
    unit = view.unit
    better = unit.direction if key == "final" else "lower is better"
    title = f"Final {unit.name.lower()}" if key == "final" else "Forgetting (max)"
    dress(axes, title, f"{unit.symbol}, {better}", grid="x")
    finished = [strategy for strategy in view.strategies if strategy.row.final.is_defined]
    for y, strategy in enumerate(finished):
        found: Estimate = strategy.row.metrics[key]
        colour = strategy.look.colour
        if not found.is_defined:
            continue
        seeds = np.array(list(found.values.values())) * unit.factor
        axes.scatter(seeds, np.full(seeds.shape, y + 0.22), s=9, color=colour, alpha=0.45, lw=0)
        if found.has_interval:
            axes.plot([found.low * unit.factor, found.high * unit.factor], [y, y], color=colour, lw=2.2)
        axes.scatter([found.mean * unit.factor], [y], s=34, color=colour, edgecolor="white", lw=0.8, zorder=3)
    axes.set_ylim(len(finished) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    names = shorts([strategy.label for strategy in finished]) if is_first else [""] * len(finished)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.margins(x=0.08)


def _draw_cost(axes: Axes, view: SectionView, against: Cost) -> None:
    unit, is_first = view.unit, against is COSTS[0]
    points = [(s, getattr(s.row, against.key), s.row.final) for s in view.strategies]
    points = [(s, x, final) for s, x, final in points if not math.isnan(x) and final.is_defined]
    size, prefix = scale_of(max((x for _, x, _ in points), default=0.0), against.base)
    label = f"{against.label} ({prefix.strip()})" if prefix else against.label
    ylabel = f"Final {unit.name.lower()} ({unit.symbol}), {unit.direction}" if is_first else ""
    dress(axes, against.title, label, ylabel, grid="both")
    if not points:
        return
    _place_on_cost_axis(axes, [x / size for _, x, _ in points])
    front = sorted((x / size, final.mean * unit.factor) for s, x, final in points if against.key in s.fronts)
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="#9aa1a9", lw=1, ls=(0, (2, 2)), zorder=1)
    for strategy, x, final in points:
        colour = strategy.look.colour
        if final.has_interval:
            ends = [final.low * unit.factor, final.high * unit.factor]
            axes.plot([x / size] * 2, ends, color=colour, lw=1.6, alpha=0.8)
        face = "white" if strategy.label == NOT_CONTINUAL else colour
        axes.scatter([x / size], [final.mean * unit.factor], s=42, facecolor=face, edgecolor=colour, lw=1.4, zorder=3)
    _label_points(axes, [(x / size, final.mean * unit.factor, s) for s, x, final in points], front)


def _place_on_cost_axis(axes: Axes, values: list[float]) -> None:
    """Linear from zero; logarithmic with a place for zero where the costs differ more than 30-fold."""
    from matplotlib.ticker import StrMethodFormatter

    positive = [value for value in values if value > 0]
    largest, smallest = max(positive, default=1.0), min(positive, default=1.0)
    if not positive:
        axes.set_xlim(-0.5, 1)
        axes.set_xticks([0])
    elif largest / smallest > 30:
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.6)
        decades = range(math.ceil(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
        axes.set_xticks([*([0] if min(values) <= 0 else []), *(10.0**power for power in decades)])
        axes.minorticks_off()
        axes.set_xlim(-0.12 * smallest if min(values) <= 0 else smallest * 0.6, largest * 3)
    else:
        axes.set_xlim(-0.05 * largest, 1.15 * largest)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _label_points(
    axes: Axes, points: list[tuple[float, float, StrategyView]], front: list[tuple[float, float]]
) -> None:
    """Names beside their points, where they cover neither points nor the front."""
    # the size of the axes is known only once the figure is laid out
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    per_pixel = 72 / figure.dpi
    spots = axes.transData.transform([(x, y) for x, y, _ in points]) * per_pixel
    names = shorts([strategy.label for _, _, strategy in points])
    box = axes.get_window_extent()
    limits = (box.x0 * per_pixel, box.y0 * per_pixel, box.x1 * per_pixel, box.y1 * per_pixel)
    steps = []
    for low, high in pairwise(axes.transData.transform(point) * per_pixel for point in front):
        steps += [
            (low[0], low[1], high[0], low[1] + 1),
            (high[0], min(low[1], high[1]), high[0] + 1, max(low[1], high[1])),
        ]
    widths = [4.9 * len(name) for name in names]
    places = beside([(x, y) for x, y in spots], widths, limits, height=9, gap=5.5, obstacles=steps)
    for (x, y, strategy), name, spot, place in zip(points, names, spots, places, strict=True):
        # the texts of a column line up towards it
        is_left = place.has_leader and place.left < spot[0]
        start = place.left + (place.width if is_left else 0)
        aligned = {"has_leader": place.has_leader, "align": "right" if is_left else "left"}
        write(axes, name, (x, y), (start - spot[0], place.middle - spot[1]), strategy.look.colour, **aligned)
