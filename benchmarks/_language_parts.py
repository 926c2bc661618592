"""The parts of `language_speed.py` that are about files: tokenising, and the memory of a whole run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cl.result import Result

MEGABYTES = 10

Rows = Iterator[tuple[str, ...]]
"""Of a table, its head first."""


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
