"""How strategies and numbers look, the same in every figure, table and page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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


def _prefixed(value: float | None, base: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    size, prefix = scale_of(abs(value), base)
    return f"{value / size:.3g}{prefix}" if value / size < 1000 else f"{value / size:.0f}{prefix}"
