"""How many pairs a memory holds before anything is trained: the cheapest number that tells update rules apart.

    python benchmarks/capacity_probe.py [--width 32] [--trials 40] [--seed 0] [--out benchmarks/results/capacity.md]

Random unit keys and values are written in one pass; then every key is asked for its last value, and the answer is the
value, of all that were written, with the largest product with what is read. A second table gives half of the keys
another value later: retention and plasticity are separate axes of one layer. Rules are those of the kernels.

Source: table of the untrained capacity probe on our method card, measured with 40 trials of a seed that is not known; a
    page has its numbers in brackets. tests/unit/backbones/test_capacity_probe.py holds rules written out to both.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention
from kernels.ridge_memory import ridge_memory

Memory = Callable[[Tensor, Tensor, Tensor], Tensor]
"""keys (N, P, K), values (N, P, V) in the order they are written, queries (N, Q, K) -> what is read (N, Q, V)."""

SHARES = (0.25, 0.5, 1, 2, 4)
"""Pairs over K."""
REASSIGNED = (8, 16, 32)
CARD: Sequence[Mapping[str, Sequence[float]]] = (
    {
        "linear": (1.00, 1.00, 0.98, 0.82, 0.46),
        "delta": (1.00, 0.99, 0.80, 0.46, 0.22),
        "ridge": (1.00, 1.00, 1.00, 0.97, 0.58),
    },
    {
        "linear": (0.75, 0.73, 0.68),
        "delta": (1.00, 0.97, 0.79),
        "ridge": (0.77, 0.76, 0.74),
        "ridge, decay 0.9": (1.00, 1.00, 0.88),
    },
)
"""The card's two tables, of K = 32."""


def linear(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """S = sum k v^T."""
    q, k, v = _written_then_read(keys, values, queries)
    return gated_linear_attention(q, k, v, scale=1.0)[0][:, keys.shape[1] :, 0]


def delta(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """S <- S - k (k^T S - v^T), one pass."""
    q, k, v = _written_then_read(keys, values, queries)
    return delta_rule(q, k, v, _is_write(k, keys.shape[1]), scale=1.0)[0][:, keys.shape[1] :, 0]


def ridge(keys: Tensor, values: Tensor, queries: Tensor, decay: float = 1.0) -> Tensor:
    """q^T (H + 0.02 |H|_F)^-1 U, H = sum k k^T, U = sum k v^T, both decaying at every write."""
    q, k, v = _written_then_read(keys, values, queries)
    is_write = _is_write(k, keys.shape[1])
    return ridge_memory(q, k, v, is_write, is_write * math.log(decay))[0][:, keys.shape[1] :, 0]


DISTINCT: Mapping[str, Memory] = {"linear": linear, "delta": delta, "ridge": ridge}
CHANGING: Mapping[str, Memory] = DISTINCT | {"ridge, decay 0.9": partial(ridge, decay=0.9)}


def _written_then_read(keys: Tensor, values: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One head: the writes, then as many tokens as there are queries, which write nothing."""
    num_writes, num_reads = keys.shape[1], queries.shape[1]
    q, k, v = F.pad(queries, (0, 0, num_writes, 0)), F.pad(keys, (0, 0, 0, num_reads)), values
    return q.unsqueeze(2), k.unsqueeze(2), F.pad(v, (0, 0, 0, num_reads)).unsqueeze(2)


def _is_write(k: Tensor, num_writes: int) -> Tensor:
    return (torch.arange(k.shape[1]) < num_writes).to(k.dtype).view(1, -1, 1).expand(k.shape[:3]).contiguous()


def trial(num_keys: int, num_changed: int, width: int, num_trials: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is written, and which write each key asks for.

    Args:
        num_changed: of the keys, the first ones, that are written again with another value.
        width: K, and V.

    Returns:
        keys and values (N, P, K) in the order of writing, and the number (Q,) of the last write of each key.
    """
    generator = Generator().manual_seed(seed)
    keys = F.normalize(torch.randn(num_trials, num_keys, width, generator=generator, dtype=torch.float64), dim=-1)
    num_writes = num_keys + num_changed
    values = F.normalize(torch.randn(num_trials, num_writes, width, generator=generator, dtype=torch.float64), dim=-1)
    last = torch.arange(num_keys)
    last[:num_changed] += num_keys
    return torch.cat((keys, keys[:, :num_changed]), 1), values, last


def capacity(
    memory: Memory, num_keys: int, num_changed: int = 0, width: int = 32, num_trials: int = 40, seed: int = 0
) -> float:
    """Share of keys that are answered with their last value."""
    keys, values, last = trial(num_keys, num_changed, width, num_trials, seed)
    read = memory(keys, values, keys[:, :num_keys])
    answers = (read @ values.transpose(1, 2)).argmax(-1)
    return float((answers == last).double().mean())


def tables(width: int, num_trials: int, seed: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Share of right answers by rule: with distinct keys by pairs over K, and with half of the keys changed."""
    shared = {"width": width, "num_trials": num_trials, "seed": seed}
    distinct = {
        name: [capacity(memory, round(share * width), **shared) for share in SHARES]
        for name, memory in DISTINCT.items()
    }
    changing = {
        name: [capacity(memory, count, count // 2, **shared) for count in REASSIGNED]
        for name, memory in CHANGING.items()
    }
    return distinct, changing


def markdown(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float]], beside: Mapping[str, Sequence[float]]
) -> str:
    """One of the tables, with the card's numbers beside its own where there are some."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{value:.2f}" for value in row]
        if name in beside:
            cells = [f"{cell} ({other:.2f})" for cell, other in zip(cells, beside[name], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    titles = (f"K = {given.width}, distinct keys, pairs =", f"K = {given.width}, half the keys re-assigned, keys =")
    columns = (("K/4", "K/2", "K", "2K", "4K"), [str(n) for n in REASSIGNED])
    found = tables(given.width, given.trials, given.seed)
    card = CARD if given.width == 32 else ({}, {})
    text = "\n\n".join(markdown(*each) for each in zip(titles, columns, found, card, strict=True))
    print(text)
    if given.out:
        how = (
            "Share of keys that memories which nothing has trained answer with their last value. Made by\n"
            f"`benchmarks/capacity_probe.py --trials {given.trials} --seed {given.seed}`. In brackets: the numbers of "
            "our method card,\nof 40 trials and another seed; they differ by what 40 trials leave open."
        )
        given.out.write_text(f"# Untrained capacity\n\n{how}\n\n{text}\n")


if __name__ == "__main__":
    main()
