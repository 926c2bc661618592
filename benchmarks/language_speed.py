"""Speed and memory of language training on a CPU: our loop beside a plain one, transformers' Trainer, tokenising, RSS.

    python benchmarks/language_speed.py --data DIR [--sections training,trainer,tokenising,memory]

DIR holds `text/`. Each section replaces its own part of the page (`--out`), so that they can be run one by one.

- training: tokens per second of our loop (journal, run folder and schedule included) and of a plain PyTorch loop of the
  same network on windows of the same tokens, which lie in memory as int64. The last column lets the plain loop leave
  documents together, as nanoGPT does: what keeping them apart costs in this network, in ours and in the plain loop.
- trainer: the same Llama of transformers in our loop (`backbone=hf`) and in transformers' Trainer, which knows no
  documents; ours with them apart and together.
- tokenising: megabytes per second on one core, from text to shards on disk with their hash, and of the encoder alone.
- memory: peak resident memory of a process that trains on so many experiences.

A rate is that of the median step, in processor time of the process (one thread), over all runs of a loop; runs of the
loops alternate, `--repeats` times, and the first round and the first two steps of a run are not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _peers import LLAMA, adamw, huggingface, plain_text
from _study import table
from torch import Tensor, nn

from cl.backbones.gpt import Gpt
from cl.backbones.hf import Hf
from cl.config import TrainerConfig
from cl.core import Stream
from cl.observe import Observer
from cl.result import Result, environment, write_text
from cl.schedules import rewarmed_cosine
from cl.tracking import Journal
from cl.trainer import Trainer
from strategies.naive import Naive
from streams.builtin_text import builtin_text

MODELS = {
    "0.02M, 8 rows of 64": ({"width": 32, "num_layers": 2}, 64, 8, 60),
    "0.4M, 16 rows of 96": ({"width": 96, "num_layers": 3}, 96, 16, 12),
    "1.1M, 16 rows of 128": ({"width": 128, "num_layers": 5}, 128, 16, 7),
}
"""Settings of the decoder, tokens of a row, rows of a step, steps of a run."""
WARM = 2
MEGABYTES = 10


def documentation(context: int) -> tuple[Stream, Tensor]:
    """A stream of one domain in bytes, and its tokens in memory."""
    stream = builtin_text(order=["docs"], context=context, general=False)
    return stream, torch.from_numpy(stream.experiences[0].load().shards[0].astype("int64"))


class Stopwatch(Observer):
    """Notes the processor time at every step."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_step(self, state: Any, losses: Any, lr: float) -> None:
        self.stamps.append(time.process_time())


def ours(backbone: Callable[..., nn.Module], stream: Stream, batch_size: int, steps: int) -> list[float]:
    """Stamps of our loop."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            stream,
            backbone,
            [Naive()],
            optimizer=adamw,
            schedule=rewarmed_cosine,
            config=TrainerConfig(
                max_steps=steps, batch_size=batch_size, clip_norm=1.0, evaluate="seen", eval_rows=1, device="cpu"
            ),
            run_dir=Path(folder),
            observers=[Journal(Path(folder)), watch],
        )
        trainer.run()
    return watch.stamps


def in_turn(runs: Mapping[str, Callable[[], list[float]]], step_tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each at its median step, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            stamps = run()[WARM:]
            if number:
                found[name] += [after - before for before, after in pairwise(stamps)]
    return {name: step_tokens / statistics.median(steps_s) for name, steps_s in found.items()}


# the sections of the page

Rows = Iterator[tuple[str, ...]]
"""Of a table, its head first."""


def training(options: argparse.Namespace) -> Rows:
    """Our loop beside the plain one."""
    yield "network, step", "ours", "plain loop", "plain, documents together", "ours / plain", "ours / plain, together"
    for title, (settings, context, batch_size, steps) in MODELS.items():
        stream, tokens = documentation(context)
        made = partial(Gpt, **settings)
        rates = in_turn(
            {
                "ours": partial(ours, made, stream, batch_size, steps),
                "plain": partial(plain_text, made, stream, tokens, batch_size, steps),
                "together": partial(plain_text, made, stream, tokens, batch_size, steps, is_separated=False),
            },
            batch_size * context,
            options.repeats,
        )
        ratios = (rates["ours"] / rates["plain"], rates["ours"] / rates["together"])
        yield title, *(f"{rate / 1000:.1f}k" for rate in rates.values()), *(f"{ratio:.2f}" for ratio in ratios)


def trainer(options: argparse.Namespace) -> Rows:
    """Our loop beside transformers' Trainer."""
    batch_size, steps = 16, 15
    stream, tokens = documentation(96)
    llama = partial(Hf, config=LLAMA)
    rates = in_turn(
        {
            "ours": partial(ours, llama, stream, batch_size, steps),
            "ours, documents together": partial(ours, partial(llama, is_separated=False), stream, batch_size, steps),
            "transformers' Trainer": partial(huggingface, stream, tokens, batch_size, steps),
        },
        batch_size * 96,
        options.repeats,
    )
    yield "loop", "tokens/s", "of transformers' Trainer"
    for name, rate in rates.items():
        yield name, f"{rate / 1000:.1f}k", f"{rate / rates[list(rates)[-1]]:.2f}"


def tokenising(options: argparse.Namespace) -> Rows:
    """From text to shards, on one core."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    from streams._shards import corpus_of
    from streams._tokenizers import Bytes, trained_bpe

    documents, size = documents_of(Path(options.data)), MEGABYTES * 1_000_000
    yield "tokenizer", "text to shards, MB/s", "encoder alone, MB/s", "bytes a token"
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in (257, 1024, 8192):
            made = Bytes() if vocabulary == 257 else trained_bpe(documents[:400], vocabulary, Path(folder), "some")
            begin = time.process_time()
            pieces = ((text, True) for text in documents)
            corpus = corpus_of("text", pieces, made, Path(folder), str(vocabulary))
            whole_s, begin = time.process_time() - begin, time.process_time()
            made.encode(documents)
            alone_s = time.process_time() - begin
            title = "bytes" if vocabulary == 257 else f"bpe of {vocabulary:,} tokens"
            per_token = corpus.num_bytes / corpus.num_tokens
            yield title, f"{size / 1e6 / whole_s:.1f}", f"{size / 1e6 / alone_s:.1f}", f"{per_token:.2f}"


def documents_of(data: Path) -> list[str]:
    """Ten megabytes of real text: the local files, then the standard library, again where they are too short."""
    from streams import _builtin_sources

    files = [*sorted((data / "text").rglob("*.jsonl")), *sorted((data / "text").rglob("*.txt"))]
    pool = [text for path in files for text in path.read_text("utf-8").split("\n\n" if path.suffix == ".txt" else "\n")]
    pool += list(_builtin_sources.code())
    documents, total = [], 0
    while total < MEGABYTES * 1_000_000:
        text = pool[len(documents) % len(pool)]
        documents.append(text)
        total += len(text.encode())
    return documents


def memory(options: argparse.Namespace) -> Rows:
    """Peak memory of processes that differ in the number of their experiences."""
    yield "experiences", "updates", "peak resident memory, MB"
    for count in (2, 10, 40):
        order = ",".join(["docs", "code"] * (count // 2))
        words = [
            "run", "tracking=none", "+experiment=builtin_text", f"stream.order=[{order}]", "trainer.max_steps=8",
            "stream.train_tokens=null", "stream.eval_tokens=4000", "out=run",
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "cl", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            cost = Result.load(Path(folder) / "run" / "result.json").cost
        yield str(count), f"{cost['updates']:.0f}", f"{cost['peak_memory_bytes'] / 1e6:.0f}"


SECTIONS: Mapping[str, Callable[[argparse.Namespace], Rows]] = {
    "training": training,
    "trainer": trainer,
    "tokenising": tokenising,
    "memory": memory,
}


def sections_of(page: Path) -> dict[str, str]:
    """What the page holds, by heading."""
    parts = page.read_text().split("\n## ")[1:] if page.is_file() else []
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def conditions(options: argparse.Namespace) -> str:
    """One sentence on what the numbers were taken with."""
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items())
    when = time.strftime("%Y-%m-%d")
    return f"{when}, {options.threads} thread, {options.repeats} runs each; {versions}."


def main(words: Sequence[str] | None = None) -> None:
    """Run the sections asked for and write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_speed.md"))
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    found = sections_of(options.out)
    for name in options.sections.split(","):
        columns, *rows = SECTIONS[name](options)
        print(f"{name}\n{table(columns, rows)}", flush=True)
        found[name] = f"{table(columns, rows)}\n{conditions(options)}"
        parts = [f"## {each}\n\n{found[each]}\n" for each in SECTIONS if each in found]
        head = (
            "# Language: speed and memory\n\nMade by `python benchmarks/language_speed.py --data DATA`, whose "
            "docstring says how.\n"
        )
        write_text(options.out, "\n".join([head, *parts]))


if __name__ == "__main__":
    main()
