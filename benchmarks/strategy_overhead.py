"""What every strategy adds to a training step, in one run: time over naive, rows declared against rows measured.

    python benchmarks/strategy_overhead.py [--steps 60] [--out benchmarks/results/strategy_overhead.md]

Network 784-256-256-10, SGD, batch 64, random images of 28x28 bytes, so no data set is needed. Time is that of the steps
of the last of three experiences, when every memory, teacher and importance is there, over naive's in the same setting
(median step of the fastest of three repeats, naive again beside each strategy); what strategies do at single steps, as
k-FPF does, shows in the mean beside the median, and work at the end of an experience is given apart. Rows are summed
over all steps of all experiences. Defaults everywhere. The other tables are those of `strategy_parts`. About four
minutes on one free core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from _random_images import stream_of
from torch import nn

from cl.backbones.mlp import Mlp
from cl.cli.allocation import keep_freed_memory
from cl.config import TrainerConfig
from cl.core import Batch, Setting, UserError
from cl.hooks import Strategy
from cl.result import environment, write_text
from cl.state import Cost, TrainState
from cl.testing import discover
from cl.trainer import Trainer

BATCH_SIZE = 64
NUM_EXPERIENCES = 3
ORDER = (Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL)


@dataclass(eq=False)
class Stopwatch(Strategy):
    """First in the chain: reads the clock and the books between steps.

    Args:
        watched: strategies whose declared cost is added up.
    """

    watched: Sequence[Strategy]
    begun: dict[int, list[float]] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    declared: list[Cost] = field(default_factory=list)
    measured: list[Cost] = field(default_factory=list)
    opened: Cost | None = None

    settings = frozenset(Setting)

    def __post_init__(self) -> None:
        self.name = "stopwatch"

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self.close(state)
        costs = (strategy.cost(state, len(batch)) for strategy in self.watched)
        self.declared.append(sum(costs, start=Cost(len(batch), len(batch))))
        self.opened = Cost(state.spent.forwards, state.spent.backwards)
        self.begun.setdefault(state.experience.id, []).append(time.process_time())
        return batch

    def on_experience_end(self, state: TrainState) -> None:
        self.ended[state.experience.id] = time.process_time()
        self.close(state)

    def close(self, state: TrainState) -> None:
        """Write down what the step that is over has spent."""
        if self.opened is not None:
            now, then = state.spent, self.opened
            self.measured.append(Cost(now.forwards - then.forwards, now.backwards - then.backwards))
        self.opened = None


class Last(Strategy):
    """Last in the chain: when the others are done with an experience."""

    settings = frozenset(Setting)

    def __init__(self) -> None:
        self.name, self.done = "last", dict[int, float]()

    def on_experience_end(self, state: TrainState) -> None:
        self.done[state.experience.id] = time.process_time()


@dataclass(frozen=True)
class Measured:
    """Of one run: seconds a step (median, mean) and at the end of an experience, rows declared and measured over all
    steps."""

    step_s: float
    mean_s: float
    end_s: float
    declared: tuple[int, int]
    measured: tuple[int, int]


def run(
    strategies: Sequence[Strategy],
    setting: Setting,
    steps: int,
    backbone: Callable[..., nn.Module] = Mlp,
    num_rows: int | None = None,
) -> Measured:
    """Train three experiences of so many steps each, on as many rows or on `num_rows`."""
    watch, last = Stopwatch(strategies), Last()
    Trainer(
        stream_of(NUM_EXPERIENCES, num_rows or steps * BATCH_SIZE, setting),
        backbone,
        [watch, *strategies, last],
        optimizer=partial(torch.optim.SGD, lr=0.01),
        config=TrainerConfig(max_steps=steps, batch_size=BATCH_SIZE, device="cpu", eval_rows=64),
    ).run()
    k = max(watch.begun)
    times = [*watch.begun[k], watch.ended[k]]
    return Measured(
        statistics.median(after - before for before, after in pairwise(times)),
        (times[-1] - times[0]) / (len(times) - 1),
        last.done[k] - watch.ended[k],
        total(watch.declared),
        total(watch.measured),
    )


def total(costs: Sequence[Cost]) -> tuple[int, int]:
    """Rows forward and backward."""
    return sum(cost.forwards for cost in costs), sum(cost.backwards for cost in costs)


def overheads(steps: int, repeats: int, names: Sequence[str]) -> list[str]:
    """A line per strategy."""
    lines = [
        "| strategy | setting | ms a step | over naive | mean over naive | ms at the end of an experience | "
        "rows a step, declared | measured | declared / measured |",
        "|---" * 9 + "|",
    ]
    for plugin in discover("strategies"):
        if names and plugin.name not in names:
            continue
        kind = plugin.load()
        settings = [setting for setting in ORDER if setting in kind.settings]
        if not settings:
            lines.append(f"| `{plugin.name}` | text only | | | | | | | |")
            continue
        lines.append(one_line(plugin.name, kind, settings[0], steps, repeats))
        print(lines[-1], flush=True)
    return lines


def one_line(name: str, kind: type, setting: Setting, steps: int, repeats: int) -> str:
    """Measure a strategy with its defaults beside naive training."""
    ours, plain = [], []
    try:
        for _ in range(repeats):
            plain.append(run([], setting, steps))
            ours.append(run([kind()], setting, steps))
    except UserError as error:
        return f"| `{name}` | {setting} | refuses: {error} | | | | | | |"
    (step_s, mean_s), (naive_s, naive_mean_s) = (
        (min(each.step_s for each in runs), min(each.mean_s for each in runs)) for runs in (ours, plain)
    )
    end_s, first = min(each.end_s for each in ours), ours[0]
    num_steps = NUM_EXPERIENCES * steps
    declared, measured = (sum(rows) for rows in (first.declared, first.measured))
    rows = [" + ".join(f"{row / num_steps:.1f}" for row in pair) for pair in (first.declared, first.measured)]
    agreement = declared / max(1, measured)
    verdict = "" if abs(agreement - 1) <= 0.1 else " **off**"
    return (
        f"| `{name}` | {setting} | {1e3 * step_s:.2f} | {step_s / naive_s:.2f}x | {mean_s / naive_mean_s:.2f}x | "
        f"{1e3 * end_s:.0f} | {rows[0]} | {rows[1]} | {agreement:.3f}{verdict} |"
    )


def main() -> None:
    """Measure and write the page."""
    import strategy_parts as parts  # beside this file, and made of its pieces

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="names of strategies, separated by commas; all when empty")
    parser.add_argument("--tables", default="strategies,buffers,fisher,start", help="which of these, by commas")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/strategy_overhead.md"))
    options = parser.parse_args()
    keep_freed_memory()  # as every command of `cl` does
    torch.set_num_threads(1)  # so that processor time is what it takes, whoever else is at work
    names = [name for name in options.only.split(",") if name]
    tables: dict[str, Callable[[], list[str]]] = {
        "strategies": lambda: overheads(options.steps, options.repeats, names),
        "buffers": lambda: parts.buffer_shares(options.steps),
        "fisher": parts.fishers,
        "start": parts.starts,
    }
    wanted = options.tables.split(",")
    if unknown := set(wanted) - set(tables):
        parser.error(f"--tables names {', '.join(sorted(unknown))}; the tables are {', '.join(tables)}")
    run([], Setting.CLASS_INCREMENTAL, options.steps)
    env = environment()
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    lines = [
        f"# What a strategy adds to a step\n\nMade by `python benchmarks/strategy_overhead.py --steps {options.steps}` "
        f"(best of {options.repeats}) on {time.strftime('%Y-%m-%d')}.\n"
        f"Processor time of one CPU thread, Python {env['python']}, {versions}.\n"
        "784-256-256-10, SGD, batch 64, defaults of every strategy, last of three experiences of random images; rows "
        "are forward + backward, per step, over all three.\n"
    ]
    for name in wanted:
        lines += [*tables[name](), ""]
    write_text(options.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
