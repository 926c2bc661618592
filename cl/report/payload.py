"""The numbers that the page draws, as small JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cl.metrics.matrix import FloatArray
from cl.report.comparison import Estimate
from cl.report.curves import COSTS, Band, Matrix, SectionView, StrategyView
from cl.report.ranks import Ranks
from cl.report.revisit import Revisit
from cl.report.style import GOODNESS, ORDER, Look
from cl.report.tokens import ByTokens
from cl.report.within import Within

MAX_CELLS = 300_000
"""Cells of R in one page, at about 5 bytes each; beyond, first the single seeds go and then rows and columns."""

MAX_POINTS = 400
"""Points of a line inside experiences; beyond, each stretch of a line is shown where it is worst."""

R_SCALE = 10_000
"""R is written in whole numbers of this fraction: 0.8312 -> 8312."""


def payload(views: Sequence[SectionView]) -> str:
    """JSON for a script element: nothing in it can end the element or start markup."""
    budget = MAX_CELLS // max(len(views), 1)
    content = {
        "scale": R_SCALE,
        "goodness": GOODNESS,
        "order": ORDER,
        "costs": [{"key": cost.key, "title": cost.title, "label": cost.label, "base": cost.base} for cost in COSTS],
        "sections": [_section(view, budget) for view in views],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def css_colour(label: str, look: Look) -> str:
    """A bound takes the grey of the reader's theme, so that it stands out on dark pages too."""
    return f"var(--{label})" if look.is_neutral else look.colour


def is_thinned(view: SectionView, num_sections: int = 1) -> bool:
    """Whether the page leaves out seeds, rows or columns of R."""
    return _num_cells(view, seeds=True) > MAX_CELLS // max(num_sections, 1)


def _section(view: SectionView, budget: int) -> dict[str, Any]:
    unit, domains = view.unit, view.section.domains
    with_seeds = _num_cells(view, seeds=True) <= budget
    # every k-th row and column leaves 1 / k^2 of the cells
    step = 1 if with_seeds else math.ceil(math.sqrt(_num_cells(view, seeds=False) / budget))
    names: list[list[str]] = []
    return {
        "unit": {
            "name": unit.name,
            "symbol": unit.symbol,
            "factor": unit.factor,
            "digits": unit.digits,
            "up": unit.higher_is_better,
        },
        "measure": view.section.measure,
        "domains": domains,
        "longest": view.num_experiences,
        "step": step,
        "smooth": max(1, round(view.smoothing / step)),
        "strategies": [_strategy(view, strategy, with_seeds, step, names) for strategy in view.strategies],
        "rows": names,
        "ranks": _ranks(view.ranks) if view.ranks else None,
        "within": view.domains_within,
    }


def _strategy(
    view: SectionView, strategy: StrategyView, with_seeds: bool, step: int, names: list[list[str]]
) -> dict[str, Any]:
    row, look = strategy.row, strategy.look
    matrices = strategy.matrices if with_seeds else strategy.matrices[:1]
    with_init = view.section.measure == "loss"
    return {
        "label": strategy.label,
        "colour": css_colour(strategy.label, look),
        "dash": look.dash,
        "neutral": look.is_neutral,
        "bound": strategy.is_bound,
        "finished": bool(row.seeds),
        "average": _band(strategy.average),
        "final": _estimate(row.final),
        "forgetting_max": _estimate(row.metrics["forgetting_max"]),
        "cost": {cost.key: _number(getattr(row, cost.key)) for cost in COSTS},
        "fronts": sorted(strategy.fronts),
        "matrices": [_matrix(matrix, step, names, with_init) for matrix in matrices],
        # the curves themselves are columns of the first matrix
        "bands": [
            [_numbers(curve.low), _numbers(curve.high)] if _has_number(curve.low) else None for curve in strategy.curves
        ]
        if any(_has_number(curve.low) for curve in strategy.curves)
        else [],
        "within": _within(strategy.within, view.unit.higher_is_better) if strategy.within else None,
        "tokens": _tokens(strategy.tokens) if strategy.tokens else None,
        "revisit": _revisit(strategy.revisit) if strategy.revisit else None,
    }


def _revisit(found: Revisit) -> dict[str, Any]:
    law = found.law
    return {
        "lag": found.lag.tolist(),
        "value": _numbers(found.value.tolist()),
        "count": found.count.tolist(),
        "practised": _number(found.practised),
        "law": {"scale": _number(law.scale), "exponent": _number(law.exponent)} if law.is_defined else None,
    }


def _ranks(found: Ranks) -> dict[str, Any]:
    return {
        "average": {label: _number(mean) for label, mean in found.average.items()},
        "difference": _number(found.critical_difference) if found.has_enough_seeds else None,
        "groups": found.groups,
    }


def _within(found: Within, higher_is_better: bool) -> dict[str, Any]:
    size = math.ceil(len(found.steps) / MAX_POINTS)
    kept = worst_points(found, size, higher_is_better)
    return {
        "steps": _numbers(found.steps[n] for n in kept),
        "ends": [at for at, n in enumerate(kept) if found.is_end[n]],
        "values": [_cells(line[kept]) for line in found.values],
        "seeds": found.num_seeds,
        "worst_of": size,
    }


def _tokens(found: ByTokens) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "values": [_cells(line) for line in found.values],
        "ends": found.ends,
        "at": found.rate_at,
        "rate": _numbers(found.rate),
        "seeds": found.num_seeds,
    }


def worst_points(found: Within, size: int, higher_is_better: bool) -> list[int]:
    """Indices of the points to show: every end, and of each `size` between ends the worst, so that no fall is lost."""
    total = np.nansum(found.values, axis=0) * (1 if higher_is_better else -1)
    kept: list[int] = []
    few: list[int] = []
    for n, is_end in enumerate(found.is_end):
        few += [] if is_end else [n]
        if few and (is_end or len(few) == size):
            kept.append(min(few, key=lambda n: total[n]))
            few = []
        kept += [n] if is_end else []
    return kept + ([min(few, key=lambda n: total[n])] if few else [])


def _matrix(matrix: Matrix, step: int, names: list[list[str]], with_init: bool) -> dict[str, Any]:
    if matrix.rows not in names:
        names.append(matrix.rows)
    # in rows before thinning: the first from which on each column counts as taught; -1 where the last row does not
    taught = np.where(matrix.seen[-1], len(matrix.seen) - np.argmin(matrix.seen[::-1], axis=0), -1)
    taught[matrix.seen.all(axis=0)] = 0
    return {
        "name": matrix.name,
        "rows": names.index(matrix.rows),
        "R": [_cells(row[::step]) for row in matrix.R[::step]],
        "init": _cells(matrix.init[::step]) if with_init and not np.isnan(matrix.init).all() else [],
        "taught": taught[::step].tolist(),
    }


def _num_cells(view: SectionView, seeds: bool) -> int:
    return sum(matrix.R.size for s in view.strategies for matrix in (s.matrices if seeds else s.matrices[:1]))


def _cells(values: FloatArray) -> list[int | None]:
    return [None if math.isnan(value) else round(value * R_SCALE) for value in values.tolist()]


def _band(band: Band) -> dict[str, Any]:
    return {"x": band.x, "mean": _numbers(band.mean), "low": _numbers(band.low), "high": _numbers(band.high)}


def _estimate(found: Estimate) -> dict[str, Any] | None:
    if not found.is_defined:
        return None
    return {
        "mean": _number(found.mean),
        "low": _number(found.low),
        "high": _number(found.high),
        "seeds": [[seed, _number(value)] for seed, value in found.values.items()],
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


def _has_number(values: Sequence[float]) -> bool:
    return not all(math.isnan(value) for value in values)
