"""Selective copying: remember the coloured tokens among noise, and write them in order at the end.

    inputs   . 3 . . 1 . 7 . = = =        targets at the marks: 3 1 7

The places are drawn anew in each row, so that no fixed convolution can do it: what is kept must depend on the content.

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (16 tokens among 4096,
    vocabulary 16). Differences: several lengths are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from cl.core import IGNORED, Setting, Stream, UserError
from streams._settings import require_integer
from streams.probes._sequences import Part, probe, require_integers, without_replacement

NOISE, MARK = 0, 1


def selective_copying(
    lengths: Sequence[int] = (4096,),
    test_lengths: Sequence[int] = (8192,),
    tokens: int = 16,
    symbols: int = 14,
    train_rows: int = 10_000,
    eval_rows: int = 500,
    seed: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        lengths: tokens before the marks, of each experience.
        test_lengths: further ones to measure on.
        tokens: to copy; as many marks stand at the end.
        symbols: that a token to copy is one of; noise and mark are two more.
        train_rows, eval_rows: of every experience, and of every domain.

    Raises:
        UserError: a value outside its range.
    """
    chosen = require_integers("lengths", lengths)
    further = require_integers("test_lengths", test_lengths) if test_lengths else []
    for name, value in (("tokens", tokens), ("symbols", symbols)):
        require_integer(f"stream.{name}", value)
    for name, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        require_integer(f"stream.{name}", value, smallest=4)
    if min(chosen + further) < tokens:
        raise UserError(f"stream.lengths holds {min(chosen + further)}; it must be at least stream.tokens={tokens}")

    def part(length: int, num_rows: int, filled_to: int = 0) -> Part:
        return Part(f"copy from {length}", partial(copying, length, tokens, symbols), num_rows, filled_to)

    longest = max(chosen) + tokens
    train = [part(length, train_rows, longest) for length in chosen]
    test = [part(length, eval_rows) for length in dict.fromkeys(chosen + further)]
    return probe("selective_copying", Setting.CONTINUAL_PRETRAINING, symbols + 2, train, test, seed)


def copying(length: int, tokens: int, symbols: int, num_rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows of `length` + `tokens` tokens."""
    places = without_replacement(num_rows, length, tokens, generator).sort(1).values
    wanted = torch.randint(2, symbols + 2, (num_rows, tokens), generator=generator)
    inputs = torch.full((num_rows, length + tokens), NOISE)
    inputs[:, length:] = MARK
    inputs.scatter_(1, places, wanted)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, length:] = wanted
    return inputs, targets
