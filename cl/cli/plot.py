"""A curve drawn with letters, for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

BARS = " ▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], marks: Collection[int] = (), width: int = 72, height: int = 6) -> str:
    """Bars over `values`, the top of the picture being the largest; `marks` get a tick below.

    Args:
        values: one per step, 0 or more; more steps than `width` are shown by their means.
        marks: steps to tick, such as the first of each experience.

    Example:
        >>> print(curve([0.0, 1.0, 2.0, 4.0], marks=[2], height=2))
        4 |   █
        0 | ▄██
          +--^-
    """
    num_columns = min(width, len(values))
    edges = [round(column * len(values) / num_columns) for column in range(num_columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    largest = max(means) or 1.0
    labels = [f"{largest:.3g}", *[""] * (height - 2), "0"] if height > 1 else [f"{largest:.3g}"]
    margin = max(map(len, labels))
    lines = []
    for row, label in zip(range(height - 1, -1, -1), labels, strict=True):
        cells = (round((mean / largest * height - row) * (len(BARS) - 1)) for mean in means)
        lines.append(f"{label:>{margin}} |" + "".join(BARS[max(0, min(len(BARS) - 1, cell))] for cell in cells))
    ticks = "".join("^" if any(a <= mark < b for mark in marks) else "-" for a, b in pairwise(edges))
    return "\n".join([*lines, " " * margin + " +" + ticks])
