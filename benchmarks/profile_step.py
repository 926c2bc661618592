"""Where the time of a training step goes, ours beside a plain loop: functions by their own time, per step.

    python benchmarks/profile_step.py --data DIR [--threads 2] [--out benchmarks/results/profile.md]

The profiler itself slows Python down by about a third, so read shares, not sums. One epoch of permuted MNIST, batch 64.
What people have written below the tables, from "## Reading it" on, is kept.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import throughput
import torch
from _peers import plain

from cl.result import write_text

STEPS = 938
ROWS = 14
READING = "## Reading it"


def profiled(run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(function, calls per step, own microseconds per step), the costliest first, after a run that is not counted."""
    run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    found = []
    for (path, line, name), (_, calls, own_s, _, _) in stats.items():
        where = name if path.startswith(("~", "<")) else f"{'/'.join(Path(path).parts[-2:])}:{line} {name}"
        found.append((where.replace("|", "/"), calls / STEPS, 1e6 * own_s / STEPS))
    return sorted(found, key=lambda row: -row[2])[:ROWS]


def main() -> None:
    """Profile both and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile.md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = {
        "ours, naive": lambda: throughput.ours(options.data, 64, False, num_experiences=1),
        "plain loop": lambda: plain(options.data, 64, False, num_experiences=1),
        "ours, replay 1000": lambda: throughput.ours(options.data, 64, True, num_experiences=1),
        "plain loop, replay 1000": lambda: plain(options.data, 64, True, num_experiences=1),
    }
    parts = [
        "# Where a training step goes\n\nMade by `python benchmarks/profile_step.py --data DATA --threads "
        f"{options.threads}` on {time.strftime('%Y-%m-%d')}: own time under cProfile, per step of {STEPS}; evaluation "
        "and loading included.\n"
    ]
    for title, run in runs.items():
        lines = [f"## {title}", "", "| function | calls a step | own µs a step |", "|---|---|---|"]
        lines += [f"| `{where}` | {calls:.1f} | {own:.0f} |" for where, calls, own in profiled(run)]
        parts.append("\n".join(lines) + "\n")
    before = options.out.read_text() if options.out.exists() else ""
    at = before.find(READING)
    write_text(options.out, "\n".join(parts) + ("\n" + before[at:] if at >= 0 else ""))


if __name__ == "__main__":
    main()
