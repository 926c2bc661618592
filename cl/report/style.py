"""How strategies and numbers look, the same in every figure, table and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TypeAlias

# Okabe & Ito (2008), without black and yellow, of which each vanishes on a page of one of the two themes
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

# bounds rather than competitors, so they step back: what happens without a remedy, and with all data at once
NEUTRAL = {"naive": "#8C8C8C", "joint": "#4D4D4D"}

# ColorBrewer YlGnBu without its palest step: one direction of lightness, safe for every kind of colour blindness
GOODNESS = ("#FBFCDD", "#DDF2B2", "#A9DDB7", "#63C3BF", "#2C9FC0", "#2072B1", "#24479D", "#0B1F5C")

# viridis, for the order of the domains
ORDER = (
    "#440154",
    "#482475",
    "#414487",
    "#355F8D",
    "#2A788E",
    "#21918C",
    "#22A884",
    "#44BF70",
    "#7AD151",
    "#BDDF26",
    "#FDE725",
)

PREFIXES = {1000: ("", " k", " M", " G", " T", " P"), 1024: (" B", " KiB", " MiB", " GiB", " TiB", " PiB")}

# left, bottom, right, top
Frame: TypeAlias = tuple[float, float, float, float]

STACK_GAP = 2.6
"""Between a column of points and its texts, in gaps between a point and a text; lines lead from one to the other."""

DASHES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Look:
    """Args:
    colour: "#RRGGBB".
    dash: one of `DASHES`; tells strategies apart when there are more of them than colours.
    is_neutral: drawn as a bound.
    """

    colour: str
    dash: str = "solid"
    is_neutral: bool = False


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """A look for each strategy, in alphabetical order, so that it does not depend on who wins.

    Example:
        >>> {label: look.colour for label, look in looks(["replay", "naive", "ewc"]).items()}
        {'ewc': '#0072B2', 'naive': '#8C8C8C', 'replay': '#D55E00'}
    """
    found, num_coloured = {}, 0
    for label in sorted(set(labels)):
        if label in NEUTRAL:
            found[label] = Look(NEUTRAL[label], "dashed" if label == "joint" else "solid", is_neutral=True)
            continue
        cycle, index = divmod(num_coloured, len(OKABE_ITO))
        found[label] = Look(OKABE_ITO[index], DASHES[cycle % len(DASHES)])
        num_coloured += 1
    return found


@dataclass(frozen=True)
class Unit:
    """How a measure is written.

    Args:
        name: of the measure.
        symbol: of its unit.
        factor: from the stored number to the written one.
        digits: after the decimal point.
        higher_is_better: direction.
    """

    name: str
    symbol: str
    factor: float
    digits: int
    higher_is_better: bool

    @property
    def axis(self) -> str:
        return f"{self.name} ({self.symbol})"

    @property
    def matrix(self) -> str:
        """Name of the files that hold R."""
        return f"{self.name.lower()}_matrix"

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    def text(self, value: float | None, signed: bool = False) -> str:
        """The number as it is written in tables; a dash where there is none."""
        if value is None or math.isnan(value):
            return "–"
        written = f"{value * self.factor:{'+' if signed else ''}.{self.digits}f}"
        # -0.0 says nothing that 0.0 does not
        return written.replace("-", "−") if float(written) else f"{0:.{self.digits}f}"


UNITS = {
    "accuracy": Unit("Accuracy", "%", 100.0, 1, higher_is_better=True),
    "loss": Unit("Loss", "nats", 1.0, 3, higher_is_better=False),
}


def count_text(value: float | None) -> str:
    """A count in three digits and a prefix: 1234567 -> "1.23 M"."""
    return _prefixed(value, 1000)


def bytes_text(value: float | None) -> str:
    """Bytes with a binary prefix: 627200 -> "612 KiB"."""
    return _prefixed(value, 1024)


def scale_of(largest: float, base: int) -> tuple[float, str]:
    """Size and name of the prefix in which a number has one to three digits before its point.

    Args:
        base: 1000 for counts, 1024 for bytes.

    Example:
        >>> scale_of(627200, 1024)
        (1024.0, ' KiB')
    """
    prefixes = PREFIXES[base]
    power = min(int(math.log(largest, base) + 1e-9), len(prefixes) - 1) if largest >= base else 0
    return float(base) ** power, prefixes[power]


def seconds_text(value: float | None) -> str:
    """Seconds as people say them: 5025 -> "1 h 23 min"."""
    if value is None or math.isnan(value):
        return "–"
    if value < 120:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def p_text(p: float) -> str:
    """A p value with its relation: "= 0.031"."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


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
    obstacles: Iterable[tuple[float, float, float, float]] = (),
) -> list[tuple[float, float]]:
    """Places for texts beside points: of eight, each takes the first that covers least, in the order of the points.

    Points of one cost stand in a column. Where its texts would touch, they take a column of their own beside it.

    Args:
        points: (x, y), y upwards; with the rest in one unit.
        widths: of the texts.
        box: left, bottom, right, top; a text outside counts as covering.
        height: of a text.
        gap: between point and text.
        obstacles: boxes that are better not covered.

    Returns: left end and middle height of each text.
    """
    taken = [*((x - gap, y - gap, x + gap, y + gap) for x, y in points), *obstacles]
    stacked: dict[int, tuple[float, float]] = {}
    for members in _crowded_columns(points, height, gap):
        found_at = _stack([points[i] for i in members], [widths[i] for i in members], box, height, gap, taken)
        stacked |= dict(zip(members, found_at, strict=True))
        taken += [_frame(stacked[i], widths[i], height) for i in members]
    places = []
    for index, ((x, y), width) in enumerate(zip(points, widths, strict=True)):
        if index in stacked:
            places.append(stacked[index])
            continue
        found = []
        for dx, dy in ((-1, 1), (1, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (0, 1.6), (0, -1.6)):
            left = x + dx * gap - (width if dx < 0 else 0 if dx else width / 2)
            middle = y + dy * (gap + height * 0.25)
            frame = _frame((left, middle), width, height)
            found.append((_covered(frame, box, taken), left, middle, frame))
        # min takes the first of equals
        _, left, middle, frame = min(found, key=lambda place: round(place[0], 6))
        taken.append(frame)
        places.append((left, middle))
    return places


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
    taken: Sequence[Sequence[float]],
) -> list[tuple[float, float]]:
    """One text over the other, all on the side where they cover less."""
    middles = spread([y for _, y in points], height * 1.1, box[1] + height / 2, box[3] - height / 2)
    x = math.fsum(x for x, _ in points) / len(points)
    sides = []
    for side in (1, -1):
        lefts = [x + STACK_GAP * gap if side > 0 else x - STACK_GAP * gap - width for width in widths]
        places = list(zip(lefts, middles, strict=True))
        frames = [_frame(place, width, height) for place, width in zip(places, widths, strict=True)]
        sides.append((math.fsum(_covered(frame, box, taken) for frame in frames), places))
    return min(sides, key=lambda side: round(side[0], 6))[1]


def _frame(place: tuple[float, float], width: float, height: float) -> Frame:
    left, middle = place
    return left, middle - height / 2, left + width, middle + height / 2


def _covered(frame: Frame, box: Frame, taken: Iterable[Sequence[float]]) -> float:
    outside = _overlap(frame, frame) - _overlap(frame, box)
    return 4 * outside + sum(_overlap(frame, other) for other in taken)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
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


def _prefixed(value: float | None, base: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    size, prefix = scale_of(abs(value), base)
    return f"{value / size:.3g}{prefix}" if value / size < 1000 else f"{value / size:.0f}{prefix}"
