"""Time of a training step with projection, as a multiple of the same step without: 784-2000-2000-10 by default.

    python benchmarks/projection_overhead.py [batch=64] [ranks=80,200,100] [hidden=2000,2000] [steps=64] [optimizer=sgd]
        [out=benchmarks/results/projection_overhead.md]

`hebbian` projects as `gpm` does, and learns the next directions besides: 70 lateral neurons a layer, one step for every
batch, or the published five. Naive and projected steps take turns in one process, so that both see the same machine;
freed memory is kept, as `cl` keeps it. The ratio is that of the means, folds included. `ranks` are the directions held
in each layer; by default those of HLOP's first experience.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from _random_images import images, stream_of

from cl.backbones.mlp import Mlp
from cl.cli.allocation import keep_freed_memory
from cl.config import TrainerConfig
from cl.hooks import Strategy
from cl.result import write_text
from cl.trainer import Trainer
from strategies.gpm import Gpm
from strategies.hebbian import Hebbian
from strategies.owm import Owm

OPTIONS = {"batch": "64", "ranks": "80,200,100", "hidden": "2000,2000", "steps": "64", "optimizer": "sgd", "out": ""}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4),
    "adam": partial(torch.optim.Adam, lr=1e-4),
}
WARMUP = 3


class Stepper:
    """A run whose steps are taken one at a time."""

    def __init__(self, strategies: list[Strategy], options: dict[str, str]) -> None:
        batch = int(options["batch"])
        stream, data = stream_of(2, 2 * batch), images(1, 2 * batch)
        config = TrainerConfig(
            max_steps=10**6, batch_size=batch, device="cpu" if not torch.cuda.is_available() else "cuda"
        )
        backbone = partial(Mlp, hidden=[int(width) for width in options["hidden"].split(",")])
        self.trainer = Trainer(stream, backbone, strategies, optimizer=OPTIMIZERS[options["optimizer"]], config=config)
        state = self.trainer.state
        state.experience, state.data = stream.experiences[1], data
        for strategy in strategies:
            strategy.on_run_start(state)
        self.rows = state.prepare(data.rows(torch.arange(batch)))

    def hold(self, ranks: list[int]) -> None:
        """As after a first experience that left so many directions in each layer."""
        state = self.trainer.state
        for strategy in self.trainer.strategies:
            for (name, subspace), rank in zip(strategy.subspaces.items(), ranks, strict=True):
                layer = strategy.layers(state)[name]
                width = layer.weight.shape[1] + 1
                rank = min(rank, width)
                subspace.basis = torch.linalg.qr(torch.randn(width, rank)).Q.to(layer.weight)
                subspace.strength = torch.ones(rank).to(layer.weight)
            strategy.on_experience_start(state)

    def __call__(self) -> float:
        begin = time.perf_counter()
        self.trainer._step([self.rows], 0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def main(words: list[str]) -> None:
    """Print a line of the table for each method."""
    keep_freed_memory()
    options = OPTIONS | dict(word.split("=", 1) for word in words)
    ranks = [int(rank) for rank in options["ranks"].split(",")]
    methods = {
        "naive": [],
        "gpm": [Gpm()],
        "owm": [Owm()],
        "hebbian, projection alone": [Hebbian(growth=0)],
        "hebbian": [Hebbian(growth=70)],
        "hebbian, five inner steps": [Hebbian(growth=70, inner_steps=5, rates=[0.001, 0.01])],
    }
    steppers = {name: Stepper(strategies, options) for name, strategies in methods.items()}
    for stepper in steppers.values():
        stepper.hold(ranks)
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(WARMUP + int(options["steps"])):
        for name, stepper in steppers.items():
            seconds = stepper()
            if turn >= WARMUP:
                times[name].append(seconds)
    plain = statistics.fmean(times["naive"])
    given = " ".join(f"{name}={value}" for name, value in options.items() if name != "out")
    size = f"784-{options['hidden'].replace(',', '-')}-10, batch {options['batch']}, {ranks} directions held"
    lines = [
        "# Cost of projection",
        "",
        f"Made by `python benchmarks/projection_overhead.py {given}`: {size}, {options['optimizer']}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, means of {options['steps']} steps that took "
        "turns.",
        "",
        "| strategy | ms a step | times naive |",
        "|---|---|---|",
    ]
    for name, seconds in times.items():
        mean = statistics.fmean(seconds)
        lines.append(f"| {name} | {1000 * mean:.2f} | {mean / plain:.2f} |")
    print("\n".join(lines))
    if options["out"]:
        write_text(Path(options["out"]), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
