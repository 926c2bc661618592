"""All scalars of one table, and how they stood after every experience."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cl.metrics import facilitation, forgetting, recurrence, stability
from cl.metrics.matrix import EvalTable

_SCALARS = (
    forgetting.final,
    forgetting.average,
    forgetting.learning,
    forgetting.bwt,
    forgetting.fwt,
    forgetting.forgetting_max,
    forgetting.forgetting_first,
    forgetting.aufc,
    stability.min_acc,
    stability.wc_acc,
    stability.stability_gap,
    stability.recovery,
    recurrence.late_average,
    recurrence.retention_exponent,
    facilitation.forward_facilitation,
)


def summary(
    table: EvalTable,
    *,
    joint: ArrayLike | None = None,
    num_samples: Sequence[float] | None = None,
) -> dict[str, float]:
    """Every scalar metric under its key in `result.json`; NaN where undefined: leave those out of a log.

    Args:
        joint: [D], last row of a joint run, for `intransigence`.
        num_samples: [D] test sizes, for `final_micro`.

    Returns: always the same keys: final, final_micro, average, learning, bwt, fwt, forgetting_max, forgetting_first,
        intransigence, aufc, min_acc, wc_acc, stability_gap, recovery, late_average, retention_exponent,
        forward_facilitation. docs/metrics.md has the formulas.

    Example:
        >>> metrics = summary(EvalTable.from_rows([[1.0, 0.25], [0.5, 1.0]], R_init=[0.0, 0.0]))
        >>> metrics["final"], metrics["bwt"], metrics["fwt"], metrics["min_acc"]
        (0.75, -0.5, 0.25, nan)
    """
    metrics = {metric.__name__: metric(table) for metric in _SCALARS}
    metrics["final_micro"] = math.nan if num_samples is None else forgetting.final(table, num_samples)
    metrics["intransigence"] = math.nan if joint is None else forgetting.intransigence(table, joint)
    return metrics


class Progress(NamedTuple):
    """The curves of a run at the end of one experience.

    Args:
        seen_average: mean over the domains visited so far.
        bwt: BWT so far.
        forgetting_avg: mean of `forgetting`, the `max` definition so far.
        forgetting: domain -> `forgetting_max` of that domain, for the domains first visited before this experience.
    """

    seen_average: float
    bwt: float
    forgetting_avg: float
    forgetting: dict[int, float]


def per_experience(table: EvalTable) -> list[Progress]:
    """One `Progress` for every experience, each from the rows that existed at its end.

    Example:
        >>> after_first, after_second = per_experience(EvalTable.from_rows([[1.0, 0.25], [0.5, 1.0]]))
        >>> after_second
        Progress(seen_average=0.75, bwt=-0.5, forgetting_avg=0.5, forgetting={0: 0.5})
        >>> after_first.seen_average, after_first.bwt, after_first.forgetting
        (1.0, nan, {})
    """
    return [progress(table.upto(i + 1)) for i in range(table.num_experiences)]


def progress(table: EvalTable) -> Progress:
    """How a run stands at the end of its last experience."""
    by_domain = forgetting.forgetting_max_by_domain(table)
    return Progress(
        seen_average=float(forgetting.seen_average(table)[-1]),
        bwt=forgetting.bwt(table),
        forgetting_avg=forgetting.forgetting_max(table),
        forgetting={j: float(by_domain[j]) for j in np.flatnonzero(table.earlier).tolist()},
    )
