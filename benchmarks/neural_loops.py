"""What the compiled loops of a neural memory are worth: chunked torch over them, in one process.

    python benchmarks/neural_loops.py [--tokens 1024] [--repeats 5] [--out benchmarks/results/neural_loops.md]

One row of tokens, four heads, one thread, float32: forward and backward of the op alone, by widths of the memory, by
tokens of a chunk, with gates or a norm. The least processor time of some calls; backends take turns.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from cl.result import write_text
from kernels.neural_memory import neural_memory

HEADS = 4
WIDTHS = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 64, 16), (32, 128, 32), (64, 256, 64))
CHUNKS = (16, 64, 256)
BACKENDS = ("chunked", "numba")


def memory(widths: Sequence[int], chunk: int, tokens: int, gates: str, is_normed: bool) -> Callable[[str], None]:
    """Forward and backward by a backend."""
    draw = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    lead, (key, *_, value) = (1, tokens, HEADS), widths
    q, k = (normalize(rand(*lead, key), dim=-1) for _ in "qk")
    given = {"q": q, "k": k, "v": rand(*lead, value), "beta": 0.1 * rand(*lead).sigmoid()}
    given |= {name: logsigmoid(rand(*lead) + 3) for name in gates.split()}
    weights = [rand(HEADS, *size) / size[0] ** 0.5 for size in pairwise(widths)]
    norm = (torch.ones(HEADS, value), torch.zeros(HEADS, value)) if is_normed else None
    for x in (*given.values(), *weights):
        x.requires_grad_()

    def step(backend: str) -> None:
        o, _ = neural_memory(**given, weights=weights, norm=norm, chunk=chunk, backend=backend)
        o.sum().backward()

    return step


def least(step: Callable[[str], None], repeats: int) -> list[float]:
    """Seconds of the processor by backend."""
    found = {backend: float("inf") for backend in BACKENDS}
    for _ in range(repeats + 1):
        for backend in BACKENDS:
            begin = time.thread_time()
            step(backend)
            found[backend] = min(found[backend], time.thread_time() - begin)
    return list(found.values())


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/neural_loops.md"))
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="as the page names it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Compiled loops of a neural memory\n",
        f"Made by `benchmarks/neural_loops.py`; how is in its docstring. {given.machine}, torch {torch.__version__},",
        f"{given.tokens:,} tokens, the least of {given.repeats} calls.\n",
        "| widths | gates | " + " | ".join(f"chunk {chunk}: chunked, loops, ms" for chunk in CHUNKS) + " |",
        "|---|---|" + "---|" * len(CHUNKS),
    ]
    for gates, is_normed, name in (("g momentum", False, "decay, momentum"), ("", True, "norm")):
        for widths in WIDTHS:
            cells = []
            for chunk in CHUNKS:
                slow, fast = least(memory(widths, chunk, given.tokens, gates, is_normed), given.repeats)
                cells.append(f"{1e3 * slow:.1f}, {1e3 * fast:.1f}: {slow / fast:.1f}x")
            lines.append(f"| {' x '.join(map(str, widths))} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    write_text(given.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
