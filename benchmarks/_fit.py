"""What the studies of architecture share: networks of equal size, and the tables of their pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import nn

from cl.backbones.mlps.moe import Moe
from cl.cli.build import make
from cl.cli.compose import composed, seeded
from cl.core import StreamInfo
from cl.metrics.statistics import ALPHA, bootstrap_ci


def active_weights(model: nn.Module) -> int:
    """Weights that touch a token: all of them, but of every mixture of experts only as many as are chosen."""
    idle = sum(
        sum(p.numel() for p in part.experts.parameters()) * (1 - part.top / len(part.experts))
        for part in model.modules()
        if isinstance(part, Moe)
    )
    return round(sum(p.numel() for p in model.parameters()) - idle)


def network(words: Sequence[str], info: StreamInfo) -> nn.Module:
    """The backbone that a request would build for the rows that `info` describes."""
    made: nn.Module = make("backbone", seeded(composed("run", list(words)), 0)["backbone"])(info)
    return made


def fitted(words: Sequence[str], target: int, info: StreamInfo, multiple: int = 8) -> tuple[str, ...]:
    """The request with the hidden width, a multiple of `multiple`, whose active weights come nearest to `target`.

    Raises:
        ValueError: as `fitted_width`.
    """

    def size(width: int) -> int:
        return active_weights(network([*words, f"backbone.mlp_width={width}"], info))

    return (*words, f"backbone.mlp_width={fitted_width(size, target, multiple, ' '.join(words))}")


def fitted_width(size: Callable[[int], int], target: int, multiple: int, name: str) -> int:
    """The hidden width whose `size`, which grows linearly, comes nearest to `target`.

    Raises:
        ValueError: the nearest is more than 3 % off, so that no study can call it equal.
    """
    first, slope = size(64), (size(128) - size(64)) / 64
    width = max(multiple, multiple * round((64 + (target - first) / slope) / multiple))
    if abs(size(width) / target - 1) > 0.03:
        raise ValueError(f"{name} has {size(width):,} weights at its nearest, and {target:,} are wanted")
    return width


# tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows)) + "\n"


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and 95 % bootstrap interval of what was measured several times."""
    if not values:
        return ""
    low, high = bootstrap_ci(values)
    spread = "" if low != low else f" [{low:{form}}, {high:{form}}]"
    return f"{fmean(values):{form}}{spread}"


def student(differences: Sequence[float]) -> tuple[float, float, float]:
    """Student's t on paired differences: low and high end of the 95 % interval of their mean, and p of no difference.

    For the few seeds of a study, from which neither a bootstrap nor a test of ranks can tell anything (three allow a
    rank test no p below 0.25, and a bootstrap covers too little); it assumes that differences are about normal.

    Example:
        >>> low, high, p = student([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2), round(p, 3)
        (-0.48, 4.48, 0.074)
    """
    from scipy.stats import t, ttest_1samp

    if len(differences) < 2:
        return math.nan, math.nan, math.nan
    values = torch.tensor(differences, dtype=torch.float64)
    mean, error = float(values.mean()), float(values.std() / len(values) ** 0.5)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    half = float(t.ppf(1 - ALPHA / 2, len(values) - 1)) * error
    return mean - half, mean + half, float(ttest_1samp(differences, 0.0).pvalue)
