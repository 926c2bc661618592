"""The Pareto front."""

import math

from cl.metrics import pareto_front


def test_dominated_strategies_are_left_out():
    points = {"joint": (0.9, 5.0), "naive": (0.2, 1.0), "slow": (0.7, 3.0), "replay": (0.8, 2.0), "poor": (0.2, 1.5)}
    assert pareto_front(points) == ["naive", "replay", "joint"]


def test_losses_are_better_when_lower():
    assert pareto_front({"a": (2.0, 1.0), "b": (1.5, 2.0), "c": (1.8, 3.0)}, higher_is_better=False) == ["a", "b"]


def test_ties_share_the_front_and_the_unknown_stays_off():
    assert pareto_front({"a": (0.5, 1.0), "b": (0.5, 1.0), "c": (math.nan, 0.1), "d": (0.9, math.nan)}) == ["a", "b"]
    assert pareto_front({"worse": (0.4, 1.0), "best": (0.5, 1.0), "dearer": (0.5, 2.0)}) == ["best"]
    assert pareto_front({}) == []
