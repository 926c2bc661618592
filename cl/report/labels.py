"""Names beside points and at the ends of lines, cut and placed so that they cover nothing; as in `assets/labels.js`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple, TypeAlias

# left, bottom, right, top; y upwards
Frame: TypeAlias = tuple[float, float, float, float]

STACK_GAP = 2.6
"""Between a column of points and its texts, in gaps between a point and a text; lines lead from one to the other."""


class Place(NamedTuple):
    """Of a text.

    Args:
        left, middle: its left end and its middle height.
        has_leader: whether a line leads to it, since it stands in a column away from its point.
    """

    left: float
    middle: float
    width: float
    has_leader: bool = False

    def frame(self, height: float) -> Frame:
        return self.left, self.middle - height / 2, self.left + self.width, self.middle + height / 2


def spread(positions: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Move labels apart until neighbours are `gap` apart, each as near to its own position as the others allow.

    Labels that touch become one block around the mean of their positions, which is the least-squares answer.

    Args:
        low, high: range for the labels; they overflow it only when it is too small for all of them.

    Example:
        >>> spread([1.0, 1.0, 5.0], gap=1.0)
        [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[tuple[float, int]] = []
    for index in order:
        start, size = positions[index], 1
        while blocks:
            other, width = blocks[-1]
            if other + width * gap <= start:
                break
            blocks.pop()
            # the block's start minimises the squared moves of all its members
            start = (other * width + (start - width * gap) * size) / (width + size)
            size += width
        blocks.append((start, size))
    # the range last, and for all alike: a block that it stops must not run into the next one
    highest = max(high - (len(positions) - 1) * gap, low)
    placed: list[float] = []
    for start, size in blocks:
        shift = len(placed) * gap
        first = min(max(start - shift, low), highest) + shift
        placed += [first + k * gap for k in range(size)]
    out = [0.0] * len(positions)
    for index, position in zip(order, placed, strict=True):
        out[index] = position
    return out


def beside(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    box: Frame,
    height: float,
    gap: float,
    obstacles: Iterable[Frame] = (),
) -> list[Place]:
    """Places for texts beside points: of eight, each takes the first that covers least, in the order of the points.

    Points of one cost stand in a column. Where its texts would touch, they take a column of their own beside it.

    Args:
        points: (x, y), y upwards; with the rest in one unit.
        widths: of the texts.
        box: a text outside counts as covering.
        height: of a text.
        gap: between point and text.
        obstacles: better not covered.
    """
    taken: list[Frame] = [*((x - gap, y - gap, x + gap, y + gap) for x, y in points), *obstacles]
    placed: dict[int, Place] = {}
    for members in _crowded_columns(points, height, gap):
        column = _stack([points[i] for i in members], [widths[i] for i in members], box, height, gap, taken)
        placed |= dict(zip(members, column, strict=True))
        taken += [place.frame(height) for place in column]
    for index, ((x, y), width) in enumerate(zip(points, widths, strict=True)):
        if index in placed:
            continue
        around = []
        for dx, dy in ((-1, 1), (1, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (0, 1.6), (0, -1.6)):
            left = x + dx * gap - (width if dx < 0 else 0 if dx else width / 2)
            around.append(Place(left, y + dy * (gap + height * 0.25), width))
        # min takes the first of equals
        placed[index] = min(around, key=lambda place: round(_covered(place.frame(height), box, taken), 6))
        taken.append(placed[index].frame(height))
    return [placed[index] for index in range(len(points))]


def _crowded_columns(points: Sequence[tuple[float, float]], height: float, gap: float) -> list[list[int]]:
    """Indices of points at one x, of which two are nearer to each other than lines of text are."""
    columns: list[list[int]] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if columns and points[index][0] - points[columns[-1][0]][0] <= gap:
            columns[-1].append(index)
        else:
            columns.append([index])
    crowded = []
    for members in columns:
        heights = sorted(points[i][1] for i in members)
        if len(members) > 2 and min(b - a for a, b in pairwise(heights)) < 1.5 * height:
            crowded.append(members)
    return crowded


def _stack(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    box: Frame,
    height: float,
    gap: float,
    taken: Sequence[Frame],
) -> list[Place]:
    """One text over the other, all on the side where they cover less."""
    middles = spread([y for _, y in points], height * 1.1, box[1] + height / 2, box[3] - height / 2)
    x = math.fsum(x for x, _ in points) / len(points)
    right, left = x + STACK_GAP * gap, x - STACK_GAP * gap
    sides = [
        [Place(start, middle, width, True) for start, middle, width in zip(starts, middles, widths, strict=True)]
        for starts in ([right] * len(widths), [left - width for width in widths])
    ]
    return min(sides, key=lambda side: round(sum(_covered(place.frame(height), box, taken) for place in side), 6))


def _covered(frame: Frame, box: Frame, taken: Iterable[Frame]) -> float:
    outside = _overlap(frame, frame) - _overlap(frame, box)
    return 4 * outside + sum(_overlap(frame, other) for other in taken)


def _overlap(a: Frame, b: Frame) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def short(name: str, length: int = 24) -> str:
    """A name cut in the middle, where it tells least."""
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 3
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"


def shorts(names: Sequence[str], length: int = 24) -> list[str]:
    """Names cut as by `short`; those that would read the same are cut around the place from which they differ.

    Example:
        >>> shorts(["replay(capacity=20, lr=0.1)", "replay(capacity=50, lr=0.1)"], 12)
        ['…ity=20, lr…', '…ity=50, lr…']
    """
    found = [short(name, length) for name in names]
    for text in {text for text in found if found.count(text) > 1}:
        same = [i for i, other in enumerate(found) if other == text]
        columns = zip(*(names[i] for i in same), strict=False)
        common = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, columns))
        start = max(0, common - length // 3)
        for i in same if len({names[i] for i in same}) > 1 else ():
            rest = names[i][start:]
            found[i] = f"…{rest if len(rest) < length else rest[: length - 2] + '…'}"
    return found
