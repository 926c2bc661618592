"""Tables and plot of what `memory_speed.py` has measured."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import relpath
from pathlib import Path
from typing import Any

import torch
from _families import family
from _study import table

BAR = 1.5
"""What memories of linear time should reach of the transformer's speed in long texts."""
PLOT = "generation.png"
HEAD = ("block", "weights", "tokens/s", "of the transformer", "its tokens/s", "MB")


def num_rows(tokens: int) -> int:
    """Of so many tokens in a training step: 4,096 tokens in all, or one longer row."""
    return max(1, 4096 // tokens)


def page(found: Mapping[str, Any], given_in: Path, folder: Path) -> str:
    """Tables for a page that lies in `given_in`, and the plot in `folder`."""
    parts = [
        "# Speed of memory\n",
        f"Made by `benchmarks/memory_speed.py`; how is in its docstring. {found.get('card') or machine()}."
        f"{found.get('note', '')} Ratios of training are to the transformer that was measured by the same call, whose "
        "tokens/s stand beside them; tables may be made by several calls, and the row `attention` is of the last.\n",
    ]
    by_length = {title: int(title.rpartition(" ")[2]) for title in found if title.startswith("train")}
    for title, tokens in sorted(by_length.items(), key=lambda item: item[1]):
        group, beside = found[title], against_peers(found[title])
        rows = [
            (
                name,
                f"{row['weights']:,.0f}",
                f"{rate:,.0f}",
                f"{row['ratio']:.2f}x",
                f"{rate / row['ratio']:,.0f}",
                f"{row['bytes'] / 1e6:,.0f}",
                *([beside.get(name, "")] if beside else []),
            )
            for name, row in sorted(group.items(), key=lambda item: -item[1]["ratio"])
            for rate in [row.get("rows", num_rows(tokens)) * tokens / row["seconds"]]
        ]
        parts += [f"## {title}\n", table((*HEAD, "of fla's layer") if beside else HEAD, rows)]
        below = [f"`{name}`" for name, *_ in rows if name != "attention" and group[name]["ratio"] < BAR]
        if tokens >= 4096 and below:
            parts += [f"Below {BAR}x: {', '.join(below)}.\n"]
    if generated := found.get("generate"):
        places = sorted({about(row["at"]) for line in generated.values() for row in line})
        head = ("block", *(f"µs after {at:,}" for at in places), "bytes of state, first", "last")
        rows = []
        for name, line in sorted(generated.items(), key=lambda item: item[1][-1]["seconds"]):
            times = {about(row["at"]): f"{1e6 * row['seconds']:,.0f}" for row in line}
            ends = (f"{line[end]['bytes']:,}" for end in (0, -1))
            rows.append((name, *(times.get(at, "") for at in places), *ends))
        text = (
            "Two blocks of width 32, one row; lengths are rounded to one digit. Memories of whole segments (rmt, armt, "
            "hmt, block_recurrent, memformer, gated_fifo, memoria) read the open segment again with every token: a "
            "step takes as long as that is, here half a segment of 32, whatever came before. memory_cache keeps a "
            "state for every segment, landmark all keys and values, by design.\n"
        )
        picture = f"![Time and state of a step over the tokens read before]({relpath(folder, given_in)}/{PLOT})\n"
        parts += ["## One step of generation\n", text, picture, table(head, rows)]
        plot(generated, folder)
    if tiny := found.get("forward"):
        rows = [(name, f"{1e3 * seconds:.1f}") for name, seconds in sorted(tiny.items(), key=lambda item: item[1])]
        parts += ["## A forward of a tiny network\n", table(("block", "ms"), rows)]
    return "\n".join(parts)


def about(number: int) -> int:
    """To one digit.

    Example:
        >>> about(112), about(100_016)
        (100, 100000)
    """
    return round(number, 1 - len(str(number)))


def against_peers(group: Mapping[str, Any]) -> dict[str, str]:
    """Tokens/s of our blocks in those of the layer of others that was measured beside them."""
    pairs = {name: group.get(row.get("peer")) for name, row in group.items()}
    return {name: f"{peer['seconds'] / group[name]['seconds']:.2f}x" for name, peer in pairs.items() if peer}


def machine() -> str:
    """What the numbers are of."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"One thread of {names[0] if names else 'an unnamed processor'}, torch {torch.__version__}"


def plot(generated: Mapping[str, Any], folder: Path) -> None:
    """Time and bytes of a step over the tokens read before, one colour for a family."""
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    lines = {}
    for axes, key, scale, what in (
        (both[0], "seconds", 1e6, "µs for one token"),
        (both[1], "bytes", 1.0, "bytes of state"),
    ):
        for name, rows in generated.items():
            label, color = family(name)
            values = [row[key] * scale for row in rows]
            width = 2.5 if name == "attention" else 1.0
            (lines[label],) = axes.plot([row["at"] for row in rows], values, marker=".", color=color, lw=width)
        axes.set(xscale="log", yscale="log", xlabel="tokens read before", ylabel=what)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines, fontsize=8, ncols=2, loc="outside lower center", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / PLOT, dpi=130)
