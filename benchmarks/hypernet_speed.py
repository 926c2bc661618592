"""Seconds of a step with a hypernetwork: against a plain functional step, against the number of tasks, and recurrent.

    python benchmarks/hypernet_speed.py [--threads 1] [--steps 20] [--out benchmarks/results/hypernet_speed.md]

Network and generator of the permuted-MNIST protocol of von Oswald et al. (784-1000-1000-10, 27 chunks of 78,000
numbers, hidden 25-25), batch 128, Adam, random images. A plain functional step is forward, backward and Adam on as many
weights through `torch.func.functional_call`. What a hypernetwork needs is that plus its generator's own
work, and it may take 1.5 times the sum. The generator's work is counted in two ways: by time (generating, and bringing
gradients back, on their own), and by floating-point operations at the rate that the plain step's run at, which is
stricter, since products with 25 hidden units are bound by memory. Medians over steps; the kinds of step take turns, so
that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _random_images import images, stream_of
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.hooks import Strategy
from cl.result import environment, write_text
from cl.trainer import Trainer
from strategies.hypernet import Hypernet
from strategies.rnn_hypernet import RnnHypernet

BATCH_SIZE = 128
PUBLISHED = {
    "chunk_size": 78000,
    "hidden": (25, 25),
    "embedding": 24,
    "chunk_embedding": 8,
    "activation": "elu",
    "start": "xavier",
}
WIDE = partial(Mlp, hidden=(1000, 1000))
SMALL = partial(Mlp, hidden=(100, 100))
Step = Callable[[], Any]


def hypernet_step(strategy: Strategy, backbone: Any, num_experiences: int) -> tuple[Step, Trainer]:
    """A step of the last experience, when all others have been seen."""
    config = TrainerConfig(batch_size=BATCH_SIZE, device="cpu")
    trainer = Trainer(
        stream_of(num_experiences, BATCH_SIZE),
        backbone,
        [strategy],
        optimizer=partial(torch.optim.Adam, lr=1e-4),
        config=config,
    )
    state = trainer.state
    strategy.on_run_start(state)
    state.model.seen[: num_experiences - 1] = True
    state.experience, state.data = state.stream.experiences[-1], images(num_experiences - 1, BATCH_SIZE)
    strategy.on_experience_start(state)
    state.model.train()
    batch = state.prepare(state.data.rows(torch.arange(BATCH_SIZE)))
    return lambda: trainer._step([batch], 0), trainer


def plain_step(backbone: Any) -> Step:
    """The same network on weights of its own, called by `functional_call`."""
    stream = stream_of(1, BATCH_SIZE)
    model = backbone(stream.info)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(list(weights.values()), lr=1e-4)
    batch = stream.prepare(images(0, BATCH_SIZE).rows(torch.arange(BATCH_SIZE)))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(functional_call(model, weights, (batch,)).logits, batch.targets).backward()
        optimizer.step()

    return step


def seconds(steps: Sequence[Step], num_steps: int) -> list[float]:
    """Median time of each kind of step; they take turns."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(num_steps + 2):
        for step, taken in zip(steps, times, strict=True):
            begin = time.perf_counter()
            step()
            if number >= 2:
                taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


def flops(step: Step) -> int:
    """Floating-point operations of matrix products in one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def generator_alone(net: Any, num_conditions: int) -> Step:
    """What no hypernetwork can do without: generate, and bring gradients of the weights back to the parameters."""
    points = torch.randn(num_conditions, net.embeddings[0].numel())
    gradients = torch.randn(num_conditions, len(net.layout))
    parameters = list(net.generator.parameters())
    return lambda: torch.autograd.grad(net.generator(points), parameters, gradients)


def against_plain(num_steps: int) -> list[str]:
    """The hypernetwork without and with its penalty, beside the plain step and the generator on its own."""
    cases = {"first task": (1, 0), "task 10, 1 old per step": (10, 1), "task 10, 4 old per step": (10, 4)}
    steps = [plain_step(WIDE)]
    for num_experiences, picked in cases.values():
        strategy = Hypernet(**PUBLISHED, penalty_conditions=picked or None)
        step, trainer = hypernet_step(strategy, WIDE, num_experiences)
        steps += [step, generator_alone(trainer.state.model, 1 + picked)]
    counts = [flops(step) for step in steps]
    plain, *others = seconds(steps, num_steps)
    lines = [
        f"Plain functional step: {counts[0] / 1e9:.2f} GFLOP, {1000 * plain:.1f} ms.",
        "",
        "| hypernet | GFLOP | ms | generator alone, ms | times the sum by time | times the sum by FLOPs |",
        "|---" * 6 + "|",
    ]
    for name, count, taken, alone in zip(cases, counts[1::2], others[::2], others[1::2], strict=True):
        by_flops = plain * count / counts[0]
        shares = f"{taken / (plain + alone):.2f} | {taken / by_flops:.2f}"
        lines.append(f"| {name} | {count / 1e9:.2f} | {1000 * taken:.1f} | {1000 * alone:.1f} | {shares} |")
    return lines


def against_tasks(num_steps: int) -> list[str]:
    """Steps at the 10th and the 100th task, with 4 old tasks a step and with all."""
    options = {"chunk_size": 2000, "hidden": (32, 32)}
    lines = ["| old tasks in the penalty | ms, T = 10 | ms, T = 100 | ratio |", "|---|---|---|---|"]
    for picked in (4, None):
        steps = [
            hypernet_step(Hypernet(**options, penalty_conditions=picked, targets="generator"), SMALL, num)[0]
            for num in (10, 100)
        ]
        ten, hundred = seconds(steps, num_steps)
        lines.append(f"| {picked or 'all'} | {1000 * ten:.1f} | {1000 * hundred:.1f} | {hundred / ten:.2f} |")
    return lines


def recurrent(num_steps: int) -> list[str]:
    """Both generators with as many parameters as each other, at the third of three tasks."""
    both = [Hypernet(chunk_size=3000, hidden=(32, 32)), RnnHypernet(chunk_size=2810, units=32)]
    made = [hypernet_step(strategy, SMALL, 3) for strategy in both]
    times = seconds([step for step, _ in made], num_steps)
    lines = ["| generator | learnt numbers | chunks | ms |", "|---|---|---|---|"]
    for strategy, (_, trainer), taken in zip(both, made, times, strict=True):
        net = trainer.state.model
        lines.append(f"| {strategy.name} | {net.num_generator} | {net.generator.num_chunks} | {1000 * taken:.1f} |")
    return lines


def profile(num_rows: int = 12) -> list[str]:
    """Where the time of a step of the 10th task goes."""
    step, _ = hypernet_step(Hypernet(**PUBLISHED, penalty_conditions=1), WIDE, 10)
    step()
    with torch.profiler.profile() as found:
        step()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [f"| {e.key} | {e.count} | {e.self_cpu_time_total / total:.0%} |" for e in events[:num_rows]]
    return ["| operation | calls | share of the time |", "|---|---|---|", *rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    versions = environment()["versions"]
    lines = [
        "# Speed of hypernetworks",
        "",
        f"Made by `benchmarks/hypernet_speed.py`: {arguments.threads} CPU thread(s), torch {versions['torch']}, batch "
        f"{BATCH_SIZE}, medians of {arguments.steps} steps.",
        "",
        "A step on permuted MNIST, published sizes, as a multiple of the plain step plus the generator's own work:",
        "",
        *against_plain(arguments.steps),
        "",
        "Against the number of tasks (784-100-100-10, chunks of 2000; one copy of the generator as target):",
        "",
        *against_tasks(arguments.steps),
        "",
        "The recurrent generator against the chunked one (784-100-100-10, third task):",
        "",
        *recurrent(arguments.steps),
        "",
        "Profile of a step of the 10th task, one old task in the penalty:",
        "",
        *profile(),
    ]
    print("\n".join(lines))
    if arguments.out:
        write_text(Path(arguments.out), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
