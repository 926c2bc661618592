"""How strongly each module of a network reacts when one experience ends and the next begins.

    c_l = |theta_l(after) - theta_l(before)|_1 / |theta_l|       mean change of a weight of module l between snapshots
    S_l = mean of c_l over first intervals after a switch / mean of c_l over late intervals of experiences

Modules with a large S_l are specific to an experience: they have to be put right when it comes back. Source: Zhao et
al., "Does Continual Learning Equally Forget All Parameters?", ICML 2023. Differences: the normalisation by late
intervals is ours; the paper compares modules by their change in the epochs after a switch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Snapshot = Mapping[str, Any]
"""Name of a parameter -> its values, as an array or a tensor on the CPU without gradient."""


@dataclass(frozen=True)
class Change:
    """What changed between two snapshots of one experience.

    Args:
        experience: position in the stream, from 0.
        interval: number of the interval within the experience, from 0; 0 begins at its first step.
        by_name: name -> c_l.
    """

    experience: int
    interval: int
    by_name: Mapping[str, float]


def mean_change(before: Snapshot, after: Snapshot, group: Callable[[str], str] = str) -> dict[str, float]:
    """c_l of every parameter, or of every group of parameters.

    Args:
        group: name of a parameter -> name of what it is counted to, such as `module_of`.

    Example:
        >>> before = {"out.weight": [1.0, 2.0], "out.bias": [0.0, 0.0]}
        >>> after = {"out.weight": [2.0, 2.0], "out.bias": [0.0, -3.0]}
        >>> mean_change(before, after), mean_change(before, after, module_of)
        ({'out.weight': 0.5, 'out.bias': 1.5}, {'out': 1.0})
    """
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    for name, old in before.items():
        apart = np.abs(np.asarray(after[name], dtype=np.float64) - np.asarray(old, dtype=np.float64))
        key = group(name)
        total[key] = total.get(key, 0.0) + float(apart.sum())
        count[key] = count.get(key, 0) + apart.size
    return {key: value / max(1, count[key]) for key, value in total.items()}


def module_of(parameter: str) -> str:
    """The module that owns a parameter.

    Example:
        >>> module_of("body.1.weight"), module_of("scale")
        ('body.1', '')
    """
    return parameter.rpartition(".")[0]


def sensitivity(changes: Sequence[Change], late_from: int = 1) -> dict[str, float]:
    """S_l by name: NaN without a switch, without late intervals, or where nothing ever changed.

    Args:
        changes: of a whole run, in any order. The first experience has no switch before it.
        late_from: first interval of an experience that counts as late.

    Example:
        >>> first = [Change(0, 0, {"a": 9.0}), Change(0, 1, {"a": 1.0})]
        >>> sensitivity([*first, Change(1, 0, {"a": 6.0}), Change(1, 1, {"a": 3.0})])
        {'a': 3.0}
    """
    first = [change.by_name for change in changes if change.experience > 0 and change.interval == 0]
    late = [change.by_name for change in changes if change.interval >= late_from]
    names = dict.fromkeys(name for change in changes for name in change.by_name)
    return {name: _ratio(_mean(first, name), _mean(late, name)) for name in names}


def ranked(sensitivities: Mapping[str, float]) -> list[str]:
    """Names, the most sensitive one first; those without a value are left out.

    Example:
        >>> ranked({"first": 2.0, "unused": float("nan"), "head": 5.0})
        ['head', 'first']
    """
    known = [name for name, value in sensitivities.items() if not math.isnan(value)]
    return sorted(known, key=lambda name: -sensitivities[name])


def _mean(changes: Sequence[Mapping[str, float]], name: str) -> float:
    values = [change[name] for change in changes if name in change]
    return sum(values) / len(values) if values else math.nan


def _ratio(first: float, late: float) -> float:
    if math.isnan(first) or first == late == 0:
        return math.nan
    return math.inf if late == 0 else first / late
