"""Average ranks of the strategies with the paired seeds as blocks: the numbers of a critical-difference diagram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cl import metrics
from cl.metrics.statistics import ALPHA
from cl.report.comparison import NOT_CONTINUAL, StrategyRow
from cl.report.style import UNITS, p_text

MIN_STRATEGIES, MIN_SEEDS = 3, 2
"""Two strategies have their paired test in the table, and one seed has no average."""


@dataclass(frozen=True)
class Ranks:
    """Strategies ranked by their final measure on every seed that all of them finished.

    Args:
        average: strategy -> mean rank, 1 = best; in this order.
        seeds: the blocks.
        critical_difference: see `cl.metrics.Ranking`.
        friedman_p: of "all strategies are alike"; NaN when they tie on every seed.
    """

    average: dict[str, float]
    seeds: tuple[int, ...]
    critical_difference: float
    friedman_p: float

    @property
    def has_enough_seeds(self) -> bool:
        """Whether the first and the last of every seed would be told apart; else the critical difference is idle."""
        return self.critical_difference < len(self.average) - 1

    @property
    def seeds_needed(self) -> int:
        """Fewest seeds for `has_enough_seeds`: the critical difference falls with the root of their number."""
        share = self.critical_difference / (len(self.average) - 1)
        return math.floor(len(self.seeds) * share**2) + 1

    @property
    def is_different(self) -> bool:
        """Whether Friedman's test rejects that all are alike; only then pairs may be told apart."""
        return self.has_enough_seeds and self.friedman_p <= ALPHA

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The largest groups that are not told apart, best first; none where there are too few seeds to tell."""
        if not self.has_enough_seeds:
            return []
        if not self.is_different:
            return [tuple(self.average)]
        return joined(self.average, self.critical_difference)

    @property
    def sentence(self) -> str:
        """What may be read from the ranks."""
        k, count = len(self.average), f"{len(self.seeds)} paired seeds"
        if not self.has_enough_seeds:
            return (
                f"{count} are too few to tell {k} strategies apart by rank: even the first and the last of every seed "
                f"would be within the critical difference; {self.seeds_needed} seeds are the least that can."
            )
        if not self.is_different:
            p = "" if math.isnan(self.friedman_p) else f" (Friedman p {p_text(self.friedman_p)})"
            return f"Over {count} the ranks do not tell the strategies apart{p}."
        return (
            f"Over {count}. Strategies under one bar are not told apart: their ranks are closer than the critical "
            f"difference {self.critical_difference:.2f} (Nemenyi at 5 %, Friedman p {p_text(self.friedman_p)})."
        )


def rank(rows: Sequence[StrategyRow]) -> Ranks | None:
    """Rank the strategies of one section; None with fewer than three of them or two seeds that all finished."""
    finals = {row.strategy: row.final.values for row in rows if row.final.is_defined and row.strategy != NOT_CONTINUAL}
    if len(finals) < MIN_STRATEGIES:
        return None
    seeds = sorted(set.intersection(*(set(values) for values in finals.values())))
    if len(seeds) < MIN_SEEDS:
        return None
    scores = {label: [values[seed] for seed in seeds] for label, values in finals.items()}
    found = metrics.average_ranks(scores, higher_is_better=UNITS[rows[0].measure].higher_is_better)
    average = dict(sorted(found.average_rank.items(), key=lambda pair: pair[1]))
    return Ranks(average, tuple(seeds), found.critical_difference, found.friedman_p)


def joined(average: dict[str, float], difference: float) -> list[tuple[str, ...]]:
    """Largest groups of two and more whose average ranks are all closer than `difference`.

    Args:
        average: strategy -> average rank, in increasing order.

    Example:
        >>> joined({"derpp": 1.0, "replay": 2.0, "ewc": 3.5, "naive": 4.0}, 2.6)
        [('derpp', 'replay', 'ewc'), ('replay', 'ewc', 'naive')]
    """
    labels, ranks = list(average), list(average.values())
    ends = [sum(other - first < difference for other in ranks) for first in ranks]
    # a group that ends where the one before ends is part of it
    starts = [0, *(i + 1 for i, (before, end) in enumerate(pairwise(ends)) if end > before)]
    return [tuple(labels[i : ends[i]]) for i in starts if ends[i] - i > 1]
