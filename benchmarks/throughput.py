"""Samples per second of our loop, a plain PyTorch loop and Avalanche, in one run, as ratios.

    python benchmarks/throughput.py --data DIR [--threads 2] [--out benchmarks/results/throughput.md]

DIR holds `MNIST/raw` in torchvision's layout (gzipped files will do). Same network (784-256-256-10), optimiser (SGD,
lr 0.1), batch, epochs and threads; permuted MNIST. The three are run in turn, `--repeats` times, and medians compared.

What each is given: the plain loop starts from float tensors that are already permuted, which costs it nothing here;
ours permutes, shuffles, converts, evaluates and keeps books inside its time; Avalanche runs its PermutedMNIST as
documented, with an empty evaluator.
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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.ledger import Ledger
from cl.result import environment, write_text
from cl.trainer import Trainer
from strategies.naive import Naive
from strategies.replay import Replay
from streams._images import load_images
from streams.permuted import permuted

Rates = tuple[float, float]
"""(train, evaluation) in samples per second."""

NUM_EXPERIENCES = 2
CAPACITY = 1000


def ours(root: str, batch_size: int, with_replay: bool, run_dir: Path | None = None, observers: tuple = ()) -> Rates:
    """Our loop, from result.json's own numbers."""
    strategy = Replay(capacity=CAPACITY) if with_replay else Naive()
    trainer = Trainer(
        permuted("mnist", NUM_EXPERIENCES, root=root),
        Mlp,
        [strategy],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(epochs=1, batch_size=batch_size),
        run_dir=run_dir,
        observers=observers,
    )
    cost = trainer.run().cost
    return cost["train_samples_per_s"], cost["eval_samples_per_s"]


def network() -> nn.Module:
    """The network of all three."""
    layers = (nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*layers)


def plain(root: str, batch_size: int, with_replay: bool) -> Rates:
    """What a person writes who wants it fast and simple."""
    images = load_images("mnist", root)
    orders = [torch.randperm(784) for _ in range(NUM_EXPERIENCES)]
    train = [images.inputs.flatten(1).index_select(1, order).float() / 255 for order in orders]
    test = [images.eval_inputs.flatten(1).index_select(1, order).float() / 255 for order in orders]
    model, buffer = network(), PlainReservoir(CAPACITY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_s = eval_s = 0.0
    for inputs in train:
        begin = time.perf_counter()
        for rows in torch.randperm(len(inputs)).split(batch_size):
            x, y = inputs.index_select(0, rows), images.targets.index_select(0, rows)
            optimizer.zero_grad()
            if with_replay and buffer.seen:
                old_x, old_y = buffer.draw(len(x))
                logits = model(torch.cat((x, old_x)))
                loss = F.cross_entropy(logits[: len(x)], y) + F.cross_entropy(logits[len(x) :], old_y)
            else:
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if with_replay:
                buffer.add(x, y)
        train_s += time.perf_counter() - begin
        begin = time.perf_counter()
        with torch.no_grad():
            for held_out in test:
                correct = 0
                for x, y in zip(held_out.split(batch_size), images.eval_targets.split(batch_size), strict=True):
                    correct += (model(x).argmax(1) == y).sum().item()
        eval_s += time.perf_counter() - begin
    rows = NUM_EXPERIENCES * len(images.targets)
    return rows / train_s, NUM_EXPERIENCES**2 * len(images.eval_targets) / eval_s


class PlainReservoir:
    """Reservoir sampling over float rows, as simply as it is usually written."""

    def __init__(self, capacity: int) -> None:
        self.inputs, self.targets = torch.zeros(capacity, 784), torch.zeros(capacity, dtype=torch.int64)
        self.capacity, self.seen = capacity, 0

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Distinct rows."""
        rows = torch.randperm(min(self.seen, self.capacity))[:size]
        return self.inputs[rows], self.targets[rows]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Offer rows."""
        for row in range(len(x)):
            slot = self.seen if self.seen < self.capacity else int(torch.randint(self.seen + 1, ()))
            if slot < self.capacity:
                self.inputs[slot], self.targets[slot] = x[row], y[row]
            self.seen += 1


def avalanche(root: str, batch_size: int, with_replay: bool) -> Rates:
    """Avalanche's PermutedMNIST with its Naive or Replay, as documented."""
    warnings.filterwarnings("ignore")
    from avalanche.benchmarks.classic import PermutedMNIST
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive as TheirNaive
    from avalanche.training.supervised import Replay as TheirReplay

    benchmark = PermutedMNIST(n_experiences=NUM_EXPERIENCES, dataset_root=root, seed=0)
    model = network()
    settings = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": batch_size,
        "train_epochs": 1,
        "eval_mb_size": batch_size,
        "evaluator": EvaluationPlugin(),
    }
    strategy = TheirReplay(mem_size=CAPACITY, **settings) if with_replay else TheirNaive(**settings)
    train_s = eval_s = 0.0
    for experience in benchmark.train_stream:
        begin = time.perf_counter()
        strategy.train(experience)
        train_s += time.perf_counter() - begin
        begin = time.perf_counter()
        strategy.eval(benchmark.test_stream)
        eval_s += time.perf_counter() - begin
    return NUM_EXPERIENCES * 60_000 / train_s, NUM_EXPERIENCES**2 * 10_000 / eval_s


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


def throughput(root: str, repeats: int) -> list[str]:
    """The table of rates and ratios."""
    lines = [
        "| batch | strategy | | ours | plain loop | Avalanche | ours / plain | ours / Avalanche |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch_size in (64, 256):
        for with_replay in (False, True):
            measured: dict[str, list[Rates]] = {"ours": [], "plain": [], "avalanche": []}
            for _ in range(repeats):
                for name, run in (("ours", ours), ("plain", plain), ("avalanche", avalanche)):
                    measured[name].append(run(root, batch_size, with_replay))
                    print(batch_size, "replay" if with_replay else "naive", name, measured[name][-1], flush=True)
            for index, phase in enumerate(("train", "evaluation")):
                rate = {name: statistics.median(each[index] for each in runs) for name, runs in measured.items()}
                cells = [f"{rate[name] / 1000:.1f}k" for name in ("ours", "plain", "avalanche")]
                ratios = [f"{rate['ours'] / rate[name]:.2f}" for name in ("plain", "avalanche")]
                strategy = f"replay {CAPACITY}" if with_replay else "naive"
                lines.append(f"| {batch_size} | {strategy} | {phase} | {' | '.join(cells + ratios)} |")
    return lines


def bookkeeping(root: str) -> list[str]:
    """Share of a run's wall time that goes into metrics, journal and MLflow."""
    from cl.tracking import Journal, MLflowTracker

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
        observers[1].open  # noqa: B018  (the store is created inside `on_start`, once per machine and not per run)
        from cl.tracking import prepare_store

        prepare_store(f"sqlite:///{folder}/mlruns.db")
        for name, method in originals.items():
            setattr(Ledger, name, timed(method))
        try:
            begin = time.perf_counter()
            ours(root, 64, False, run_dir, observers)
            wall = time.perf_counter() - begin
        finally:
            for name, method in originals.items():
                setattr(Ledger, name, method)
    return [
        f"Metrics, journal and MLflow: {spent:.2f} s of {wall:.1f} s wall time, {100 * spent / wall:.1f} % "
        f"(permuted MNIST, {NUM_EXPERIENCES} experiences, batch 64; every step's loss read, every 100th logged)."
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
    title = f"# Throughput\n\nMade by `python benchmarks/throughput.py --threads {options.threads}` "
    title += f"(median of {options.repeats}) on {time.strftime('%Y-%m-%d')}.\nCPU, {options.threads} threads, "
    title += f"Python {env['python']}, {versions}. Samples per second.\n"
    text = "\n".join([title, *table, "", *books, "", *commands(), ""])
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
