"""Rows as Markdown: the whole table, and the tables that README and docs mark for themselves.

A mark names the device, the ops of its table and, with `short`, the columns a reader of the docs needs:
`<!-- bench cpu linear_scan short -->` ... `<!-- end bench -->`. A run fills every mark all of whose ops it measured.
"""

import re
from typing import Any

Rows = list[dict[str, Any]]
COLUMNS = ["op", "B T H D", "dtype", "pass", "backend", "ms", "Mtok/s", "GB/s", "% roofline", "launches", "graph ms"]
COLUMNS += ["max rel err", "loop ms", "x loop", "cpu ms", "loop cpu ms", "x loop cpu", "peak memory"]
COLUMNS += ["peer", "peer err", "peer ms", "x peer"]
SHORT = ["op", "B T H D", "dtype", "pass", "ms", "% roofline", "max rel err", "cpu ms", "x loop cpu", "peak memory"]
SHORT += ["peer", "x peer"]
_MARK = re.compile(r"(<!-- bench (cpu|cuda) (\S+)( short)? -->).*?(<!-- end bench -->)", re.DOTALL)


def cell(value: Any) -> str:
    """A number with three digits, anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def line(row: dict[str, Any]) -> str:
    """One row as it is printed while the bench runs."""
    return "  ".join(f"{c} {cell(row[c])}" for c in COLUMNS if row.get(c) is not None)


def table(rows: Rows, columns: list[str] = COLUMNS) -> str:
    """Rows as Markdown, without the columns that are empty throughout."""
    kept = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = ["| " + " | ".join(kept) + " |", "|" + "---|" * len(kept)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row.get(c)) for c in kept) + " |" for row in rows)])


def fill(text: str, device: str, rows: Rows, header: str) -> str:
    """The text with every marked table replaced that these rows can fill."""

    def block(mark: re.Match[str]) -> str:
        begin, wanted, names, short, end = mark.groups()
        own = [row for row in rows if row["op"] in names.split(",")]
        if wanted != device or {row["op"] for row in own} != set(names.split(",")):
            return mark[0]
        return "\n".join([begin, header, "", table(own, SHORT if short else COLUMNS), end])

    return _MARK.sub(block, text)
