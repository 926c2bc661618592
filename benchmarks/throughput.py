"""Samples per second of our loop, a plain PyTorch loop and Avalanche, in one run, as ratios.

    python benchmarks/throughput.py --data DIR [--threads 2] [--out benchmarks/results/throughput.md]

DIR holds `MNIST/raw` in torchvision's layout (gzipped files will do). Same network (784-256-256-10), optimiser (SGD,
lr 0.1), batch, epochs and threads; permuted MNIST. The three are run in turn, `--repeats` times, and medians compared.

What each is given: images in memory, ours as bytes, the plain loop as floats in [0, 1]. Ours permutes, shuffles,
converts and keeps books inside its time, and permutes a test set each time it is measured. The plain loop permutes each
training set when its turn comes and each test set once; its second column has that for free, as if all permuted floats
had lain in memory before. Avalanche runs its PermutedMNIST as documented, with an empty evaluator; hosted,
the same class of its runs by `strategy=avalanche/NAME`. One run of ours and of the plain loop comes first and is not
counted.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from _peers import CAPACITY, NUM_EXPERIENCES, Rates, avalanche, plain

from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.hooks import Strategy
from cl.ledger import Ledger
from cl.result import environment, write_text
from cl.trainer import Trainer
from strategies.naive import Naive
from strategies.replay import Replay
from streams.permuted import permuted

BOOKS_EXPERIENCES = 10


def ours(
    root: str,
    batch_size: int,
    with_replay: bool,
    run_dir: Path | None = None,
    observers: tuple = (),
    num_experiences: int = NUM_EXPERIENCES,
) -> Rates:
    """Our loop, from result.json's own numbers."""
    strategy = Replay(capacity=CAPACITY) if with_replay else Naive()
    return _trained(Trainer, strategy, root, batch_size, run_dir, observers, num_experiences)


def hosted(root: str, batch_size: int, with_replay: bool) -> Rates:
    """Avalanche's own strategies in Avalanche's own template, on our stream."""
    from cl.interop.avalanche import strategy_class

    strategy = strategy_class("Replay")(mem_size=CAPACITY) if with_replay else strategy_class("Naive")()
    return _trained(strategy.trainer, strategy, root, batch_size)


def _trained(
    trainer_class: type[Trainer],
    strategy: Strategy,
    root: str,
    batch_size: int,
    run_dir: Path | None = None,
    observers: tuple = (),
    num_experiences: int = NUM_EXPERIENCES,
) -> Rates:
    trainer = trainer_class(
        permuted("mnist", num_experiences, root=root),
        Mlp,
        [strategy],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(epochs=1, batch_size=batch_size),
        run_dir=run_dir,
        observers=observers,
    )
    cost = trainer.run().cost
    return cost["train_samples_per_s"], cost["eval_samples_per_s"]


@contextmanager
def unpacked(root: Path) -> Iterator[str]:
    """A root whose MNIST files are not gzipped, which is all that torchvision reads."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for path in (root / "MNIST" / "raw").iterdir():
            if path.suffix == ".gz":
                (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            else:
                shutil.copy(path, raw)
        yield folder


NAMES = ("ours", "plain loop", "plain, permuted for free", "Avalanche", "Avalanche hosted")


def throughput(root: str, repeats: int) -> list[str]:
    """The table of rates and ratios."""
    ours(root, 64, False), plain(root, 64, False)
    lines = [
        f"| batch | strategy | | {' | '.join(NAMES)} | {' | '.join(f'ours / {name}' for name in NAMES[1:-1])} "
        "| hosted / Avalanche |",
        "|---" * (3 + len(NAMES) + len(NAMES) - 1) + "|",
    ]
    for batch_size in (64, 256):
        for with_replay in (False, True):
            measured: list[tuple[Rates, ...]] = []
            for _ in range(repeats):
                case = root, batch_size, with_replay
                measured.append((ours(*case), *plain(*case), avalanche(*case), hosted(*case)))
                print(batch_size, "replay" if with_replay else "naive", measured[-1], flush=True)
            for index, phase in enumerate(("train", "evaluation")):
                rates = [statistics.median(each[who][index] for each in measured) for who in range(len(NAMES))]
                cells = [f"{rate / 1000:.1f}k" for rate in rates]
                ratios = [f"{rates[0] / rate:.2f}" for rate in rates[1:-1]] + [f"{rates[-1] / rates[-2]:.2f}"]
                strategy = f"replay {CAPACITY}" if with_replay else "naive"
                lines.append(f"| {batch_size} | {strategy} | {phase} | {' | '.join(cells + ratios)} |")
    return lines


def bookkeeping(root: str) -> list[str]:
    """Share of a run's wall time that goes into metrics, journal and MLflow."""
    from cl.tracking import Journal, MLflowTracker, prepare_store

    spent = 0.0

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            nonlocal spent
            begin = time.perf_counter()
            method(*arguments, **named)
            spent += time.perf_counter() - begin

        return call

    originals = {name: getattr(Ledger, name) for name in ("watch", "tell", "save")}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        observers = (Journal(run_dir), MLflowTracker(f"sqlite:///{folder}/mlruns.db", run_dir=run_dir))
        # the store is made once, not once per run
        prepare_store(f"sqlite:///{folder}/mlruns.db")
        for name, method in originals.items():
            setattr(Ledger, name, timed(method))
        try:
            begin = time.perf_counter()
            ours(root, 64, False, run_dir, observers, BOOKS_EXPERIENCES)
            wall = time.perf_counter() - begin
        finally:
            for name, method in originals.items():
                setattr(Ledger, name, method)
    return [
        f"Metrics, journal and MLflow: {spent:.2f} s of {wall:.1f} s wall time, {100 * spent / wall:.1f} % "
        f"(permuted MNIST, {BOOKS_EXPERIENCES} experiences, batch 64; every step's loss read, every 100th logged)."
    ]


def commands() -> list[str]:
    """Seconds until the light commands have answered, best of five."""
    lines = []
    for words in (["--help"], ["list"]):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "cl", *words], check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        lines.append(f"`cl {' '.join(words)}` answers in {min(times):.2f} s (best of 5).")
    return lines


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with unpacked(options.data) as root:
        table, books = throughput(root, options.repeats), bookkeeping(root)
    env = environment()
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    title = f"# Throughput\n\nMade by `python benchmarks/throughput.py --data DATA --threads {options.threads}` "
    title += f"(median of {options.repeats}) on {time.strftime('%Y-%m-%d')}.\nCPU, {options.threads} threads, "
    title += f"Python {env['python']}, {versions}. Samples per second.\n"
    text = "\n".join([title, *table, "", *books, "", *commands(), ""])
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
