"""Performance against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping


def pareto_front(points: Mapping[str, tuple[float, float]], *, higher_is_better: bool = True) -> list[str]:
    """The strategies that no other one beats: at least as good and as cheap, and better in one of the two.

    Args:
        points: strategy -> (value, cost); cost in any unit, lower is better (`cost` of `result.json`).
        higher_is_better: direction of the value; False for losses and forgetting.

    Returns: names by increasing cost. A strategy with NaN is never on the front.

    Example:
        >>> pareto_front({"naive": (0.2, 1.0), "replay": (0.8, 2.0), "slow": (0.7, 3.0), "joint": (0.9, 5.0)})
        ['naive', 'replay', 'joint']
    """
    sign = 1 if higher_is_better else -1
    known = {name: (sign * value, cost) for name, (value, cost) in points.items() if not math.isnan(value + cost)}

    def is_beaten(name: str) -> bool:
        value, cost = known[name]
        return any(v >= value and c <= cost and (v, c) != (value, cost) for v, c in known.values())

    return sorted((name for name in known if not is_beaten(name)), key=lambda name: known[name][1])
