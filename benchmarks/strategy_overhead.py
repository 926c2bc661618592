"""What every strategy adds to a training step, in one run: time over naive, rows declared against rows measured.

    python benchmarks/strategy_overhead.py [--threads 1] [--steps 200] [--out benchmarks/results/strategy_overhead.md]

Network 784-256-256-10, SGD, batch 64, random images of 28x28 bytes, so no data set is needed. Time is that of the steps
of the last of three experiences, when every memory, teacher and importance is there, over naive's in the same setting
(median of three repeats, naive again beside each strategy); work at the end of an experience is given apart. Rows are
summed over all steps of all experiences. Defaults everywhere. Below: the share of a step that the buffers take, and the
Fisher information in one pass against row by row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones.convnet import Convnet
from cl.backbones.mlp import Mlp
from cl.buffers.base import make_buffer, stored_rows
from cl.config import TrainerConfig
from cl.core import Batch, EvalSet, Experience, Setting, Stream, StreamInfo, TensorData, UserError
from cl.hooks import Strategy
from cl.result import environment, write_text
from cl.state import Cost, TrainState
from cl.testing import discover
from cl.trainer import Trainer
from strategies._importance import mean_over_rows

BATCH_SIZE = 64
NUM_EXPERIENCES = 3
CAPACITY = 10_000
POLICIES = ("reservoir", "class_balanced", "experience_balanced", "ring")
ORDER = (Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL)


def in_unit_interval(raw: Tensor) -> Tensor:
    """Bytes -> [0, 1]."""
    return raw / 255


def images(k: int, num_rows: int, setting: Setting) -> TensorData:
    """Random images; labels are what the setting makes of experience k."""
    generator = torch.Generator().manual_seed(k)
    raw = torch.randint(256, (num_rows, 1, 28, 28), dtype=torch.uint8, generator=generator)
    low, width = (3 * k, 3) if setting == Setting.CLASS_INCREMENTAL else (0, 10)
    targets = low + torch.randint(width, (num_rows,), generator=generator)
    return TensorData(raw, targets, k, k if setting == Setting.TASK_INCREMENTAL else None)


def stream_of(setting: Setting, num_rows: int) -> Stream:
    """Three experiences of random images."""
    is_task, is_class = setting == Setting.TASK_INCREMENTAL, setting == Setting.CLASS_INCREMENTAL
    experiences, eval_sets = [], []
    for k in range(NUM_EXPERIENCES):
        classes = tuple(range(3 * k, 3 * k + 3)) if is_class else tuple(range(10))
        load, task_id = partial(images, k, num_rows, setting), k if is_task else None
        experiences.append(Experience(k, f"{k}", f"{k}", load, num_rows, classes, task_id))
        eval_sets.append(EvalSet(f"{k}", partial(images, k, 64, setting), 64))
    heads = NUM_EXPERIENCES if is_task else 1
    info = StreamInfo("random images", setting, (1, 28, 28), 10, NUM_EXPERIENCES, heads)
    return Stream(info, experiences, eval_sets, in_unit_interval)


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
    at_end: list[Cost] = field(default_factory=list)

    settings = frozenset(Setting)

    def __post_init__(self) -> None:
        self.name = "stopwatch"

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self.close(state)
        costs = (strategy.cost(state, len(batch)) for strategy in self.watched)
        self.declared.append(sum(costs, start=Cost(len(batch), len(batch))))
        self.opened = Cost(state.spent.forwards, state.spent.backwards)
        self.begun.setdefault(state.experience.id, []).append(time.perf_counter())
        return batch

    def on_experience_end(self, state: TrainState) -> None:
        self.ended[state.experience.id] = time.perf_counter()
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
        self.done[state.experience.id] = time.perf_counter()


@dataclass(frozen=True)
class Measured:
    """Of one run: seconds a step and at the end of an experience, rows declared and measured over all steps."""

    step_s: float
    end_s: float
    declared: tuple[int, int]
    measured: tuple[int, int]


def run(
    strategies: Sequence[Strategy], setting: Setting, steps: int, backbone: Callable[..., nn.Module] = Mlp
) -> Measured:
    """Train three experiences of so many steps each."""
    watch, last = Stopwatch(strategies), Last()
    Trainer(
        stream_of(setting, steps * BATCH_SIZE),
        backbone,
        [watch, *strategies, last],
        optimizer=partial(torch.optim.SGD, lr=0.01),
        config=TrainerConfig(max_steps=steps, batch_size=BATCH_SIZE, device="cpu", eval_rows=64),
    ).run()
    k = max(watch.begun)
    times = [*watch.begun[k], watch.ended[k]]
    return Measured(
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
        "| strategy | setting | ms a step | over naive | ms at the end of an experience | rows a step, declared | "
        "measured | declared / measured |",
        "|---" * 8 + "|",
    ]
    for plugin in discover("strategies"):
        if names and plugin.name not in names:
            continue
        kind = plugin.load()
        settings = [setting for setting in ORDER if setting in kind.settings]
        if not settings:
            lines.append(f"| `{plugin.name}` | text only | | | | | | |")
            continue
        lines.append(one_line(plugin.name, kind, settings[0], steps, repeats))
        print(lines[-1], flush=True)
    return lines


def one_line(name: str, kind: type, setting: Setting, steps: int, repeats: int) -> str:
    """Measure a strategy with its defaults beside naive training."""
    ours, plain = [], []
    try:
        for _ in range(repeats):
            plain.append(run([], setting, steps).step_s)
            ours.append(run([kind()], setting, steps))
    except UserError as error:
        return f"| `{name}` | {setting} | refuses: {error} | | | | | |"
    step_s, naive_s = (statistics.median(times) for times in ([each.step_s for each in ours], plain))
    end_s, first = statistics.median(each.end_s for each in ours), ours[0]
    num_steps = NUM_EXPERIENCES * steps
    declared, measured = (sum(rows) for rows in (first.declared, first.measured))
    rows = [" + ".join(f"{row / num_steps:.1f}" for row in pair) for pair in (first.declared, first.measured)]
    agreement = declared / max(1, measured)
    return (
        f"| `{name}` | {setting} | {1e3 * step_s:.2f} | {step_s / naive_s:.2f}x | {1e3 * end_s:.0f} | {rows[0]} | "
        f"{rows[1]} | {agreement:.3f}{'' if abs(agreement - 1) <= 0.1 else ' **off**'} |"
    )


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def buffer_shares(steps: int) -> list[str]:
    """Insertion of a batch and a draw as large, against a step of experience replay and one of plain training."""
    setting = Setting.CLASS_INCREMENTAL
    replay = discover_one("replay")
    plain_s = statistics.median(run([], setting, steps).step_s for _ in range(3))
    replay_s = statistics.median(run([replay(capacity=CAPACITY)], setting, steps).step_s for _ in range(3))
    lines = [
        f"A plain step takes {1e3 * plain_s:.2f} ms, one with replay {1e3 * replay_s:.2f} ms.",
        "",
        "| policy | insertion, µs | draw and rows, µs | share of a step with replay | of a plain step |",
        "|---|---|---|---|---|",
    ]
    data = images(0, 20_000, Setting.DOMAIN_INCREMENTAL)
    for policy in POLICIES:
        buffer, generator = make_buffer(policy, CAPACITY), torch.Generator().manual_seed(0)
        for rows in stored_rows(data):
            buffer.add(rows, generator)
        batches = list(stored_rows(data, torch.arange(100 * BATCH_SIZE), BATCH_SIZE))
        add_s = best(lambda: [buffer.add(rows, generator) for rows in batches], 5) / len(batches)  # noqa: B023
        draw_s = best(lambda: [buffer.rows(buffer.draw(BATCH_SIZE, generator)) for _ in range(100)], 5) / 100  # noqa: B023
        share = [(add_s + draw_s) / step_s for step_s in (replay_s, plain_s)]
        lines.append(
            f"| {policy} | {1e6 * add_s:.0f} | {1e6 * draw_s:.0f} | {100 * share[0]:.1f} % | {100 * share[1]:.1f} % |"
        )
    return lines


def discover_one(name: str) -> Any:
    """The class of a strategy."""
    return next(plugin.load() for plugin in discover("strategies") if plugin.name == name)


class Learnt(Strategy):
    """Times the Fisher information at the end of the first experience, in one pass and row by row."""

    settings = frozenset(Setting)

    def __init__(self, num_rows: int) -> None:
        self.name, self.num_rows, self.seconds = "learnt", num_rows, (0.0, 0.0)
        self.apart = 0.0

    def on_experience_end(self, state: TrainState) -> None:
        if state.experience.id > 0:
            return
        index, found = torch.arange(self.num_rows), []

        def fisher(group: int) -> None:
            found.append(mean_over_rows(state, index, F.cross_entropy, torch.square, group=group))

        def row_by_row() -> None:
            import strategies._importance as module

            can, module._can_be_vectorised = module._can_be_vectorised, lambda _: False
            try:
                fisher(1)
            finally:
                module._can_be_vectorised = can

        fisher(1)
        self.seconds = best(lambda: fisher(1), 5), best(row_by_row, 2)
        self.apart = max(float((found[0][n] - found[-1][n]).abs().max() / found[-1][n].max()) for n in found[0])


def fishers() -> list[str]:
    """Both ways on the networks of the MNIST protocols."""
    lines = [
        "| network | row by row, µs a row | in one pass, µs a row | ratio | largest difference |",
        "|---|---|---|---|---|",
    ]
    networks = {
        "MLP 784-100-100-10": partial(Mlp, hidden=(100, 100)),
        "MLP 784-256-256-10": Mlp,
        "convnet": Convnet,
    }
    for name, backbone in networks.items():
        learnt = Learnt(num_rows=1024)
        run([learnt], Setting.CLASS_INCREMENTAL, 20, backbone)
        one, each = (1e6 * seconds / learnt.num_rows for seconds in learnt.seconds)
        lines.append(f"| {name} | {each:.0f} | {one:.1f} | {each / one:.1f}x | {learnt.apart:.0e} |")
    return lines


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="names of strategies, separated by commas; all when empty")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/strategy_overhead.md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run([], Setting.CLASS_INCREMENTAL, options.steps)
    names = [name for name in options.only.split(",") if name]
    env = environment()
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    title = (
        f"# What a strategy adds to a step\n\nMade by `python benchmarks/strategy_overhead.py --threads "
        f"{options.threads} --steps {options.steps}` (median of {options.repeats}) on {time.strftime('%Y-%m-%d')}.\n"
        f"CPU, {options.threads} thread{'s' * (options.threads > 1)}, Python {env['python']}, {versions}.\n"
        "784-256-256-10, SGD, batch 64, defaults of every strategy, last of three experiences of random images; rows "
        "are forward + backward, per step, over all three.\n"
    )
    parts = [title, *overheads(options.steps, options.repeats, names), ""]
    parts += [f"## Buffers: batch {BATCH_SIZE}, capacity {CAPACITY:,}", "", *buffer_shares(options.steps), ""]
    parts += ["## Fisher information, 1,024 rows", "", *fishers(), ""]
    write_text(options.out, "\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    main()
