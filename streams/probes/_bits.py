"""Streams over sequences of bits whose label depends on the last N of them; an experience for each N.

A row (T, 2) holds a sequence of N + 2 to 4 N bits at its end, each as one of two, after steps without input, so that
its length tells nothing and the network cannot count from the start.

With one head (domain_incremental) the same output is asked for another N in every experience: the single-head
curriculum, which has to let go of what it knew. With a head for each N (task_incremental) and `strategy=cumulative` all
N so far are asked for: the multi-head curriculum.

Source: Khajehabdollahi, Zeraati et al., "Emergent mechanisms for long timescales depends on training curriculum and
    affects performance in memory tasks", ICLR 2024. Differences: experiences have a budget, where the paper goes on to
    the next N at 98 % accuracy; a head is asked on rows of its own; bits are one of two, not one number, so that a step
    without input can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from cl.core import Setting, Stream
from streams._settings import require_integer
from streams.probes._sequences import Part, probe, require_integers

Label = Callable[[Tensor, int], Tensor]
"""(the last N bits (B, N), N) -> class (B,)."""


def bit_stream(
    name: str,
    label: Label,
    setting: Setting,
    sizes: Sequence[int],
    train_rows: int,
    eval_rows: int,
    seed: int,
    smallest: int = 1,
) -> Stream:
    """The stream with an experience for each N of `sizes`, which are at least `smallest`.

    Raises:
        UserError: a value outside its range.
    """
    chosen = require_integers("sizes", sizes, smallest)
    for option, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        require_integer(f"stream.{option}", value, smallest=4)
    steps = max(4 * max(chosen), max(chosen) + 2)

    def part(k: int, num_rows: int) -> Part:
        task_id = k if setting == Setting.TASK_INCREMENTAL else None
        return Part(f"N = {chosen[k]}", partial(bits, label, chosen[k], steps), num_rows, 0, task_id)

    train = [part(k, train_rows) for k in range(len(chosen))]
    return probe(name, setting, 2, train, [part(k, eval_rows) for k in range(len(chosen))], seed)


def bits(label: Label, size: int, steps: int, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows (T, 2) and the class of each."""
    drawn = torch.randint(2, (num_rows, steps), generator=generator)
    length = torch.randint(size + 2, max(4 * size, size + 2) + 1, (num_rows, 1), generator=generator)
    is_there = torch.arange(steps) >= steps - length
    inputs = torch.stack((drawn == 0, drawn == 1), 2) & is_there.unsqueeze(2)
    return inputs.float(), label(drawn[:, -size:], size)
