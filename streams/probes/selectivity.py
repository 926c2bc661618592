"""Selectivity: a rule over the last two symbols, however long the gaps between them are.

    inputs   a . b . . . ? c . ? d e . ? f ...        targets at the marks: c = rule[a, b], d = rule[b, c], f = ...

Symbols follow a rule that is learnt in the weights; gaps of irregular length, filled with tokens that mean nothing,
break the transitions, so that places in time say nothing and the content decides what is kept. Now and then a symbol is
drawn in place of following the rule, without a mark, so that a row cannot be foretold from its beginning. Every
experience has symbols and a rule of its own; gaps other than those of training are measured beside.

Source: own design, in the spirit of SelectivBench (rule grammars with irregular gaps that break transitions), whose
    code was not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from cl.core import IGNORED, Setting, Stream, UserError
from cl.seeding import derive_seed
from streams._settings import is_list, require_integer
from streams.probes._sequences import Part, probe, require_table

MARK = 0


def selectivity(
    num_experiences: int = 3,
    symbols: int = 6,
    length: int = 64,
    gaps: Sequence[int] = (0, 3),
    test_gaps: Sequence[Sequence[int]] = ((0, 0), (4, 8)),
    fillers: int = 4,
    restart: float = 0.2,
    train_rows: int = 5000,
    eval_rows: int = 500,
    seed: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        symbols: of each rule; rule[a, .] is a permutation of them for every a.
        length: tokens of a row.
        gaps: shortest and longest gap before a symbol, in training.
        test_gaps: further ones to measure on.
        fillers: different tokens in gaps.
        restart: chance that a symbol is drawn in place of following the rule.
        train_rows, eval_rows: of every experience, and of every domain.
        seed: of the rules and the rows.

    Raises:
        UserError: a value outside its range.
    """
    for name, value, smallest in (
        ("num_experiences", num_experiences, 1),
        ("symbols", symbols, 2),
        ("fillers", fillers, 1),
        ("train_rows", train_rows, 4),
        ("eval_rows", eval_rows, 4),
    ):
        require_integer(f"stream.{name}", value, smallest)
    if not is_list(gaps, 2):
        raise UserError(f"stream.gaps is {gaps!r}; it must be the shortest and the longest one, such as [0, 3]")
    further = require_table("test_gaps", test_gaps, ("shortest", "longest"), 0) if test_gaps else []
    table = require_table("gaps", [gaps], ("shortest", "longest"), 0) + further
    ranges = list(dict.fromkeys((low, high) for low, high in table))
    for low, high in ranges:
        if low > high:
            raise UserError(f"a gap of {low} to {high} tokens is none; the shortest comes first")
    # two symbols, the mark and a third one, behind the longest gaps
    require_integer("stream.length", length, smallest=3 * max(high for _, high in ranges) + 4)
    if isinstance(restart, bool) or not isinstance(restart, int | float) or not 0 <= restart < 1:
        raise UserError(f"stream.restart is {restart!r}; it must be a number from 0 to below 1")

    def part(k: int, gap: tuple[int, int], num_rows: int) -> Part:
        law = partial(grammar, rule_of(seed, k, symbols), 1 + fillers + k * symbols, length, gap, fillers, restart)
        return Part(f"rule {k}, gaps {gap[0]} to {gap[1]}", law, num_rows)

    train = [part(k, ranges[0], train_rows) for k in range(num_experiences)]
    test = [part(k, gap, eval_rows) for gap in ranges for k in range(num_experiences)]
    num_tokens = 1 + fillers + num_experiences * symbols
    return probe("selectivity", Setting.CONTINUAL_PRETRAINING, num_tokens, train, test, seed)


def rule_of(seed: int, k: int, symbols: int) -> Tensor:
    """(S, S) the symbol that follows a and then b, at [a, b]."""
    generator = Generator().manual_seed(derive_seed(seed, "rule", k))
    return torch.stack([torch.randperm(symbols, generator=generator) for _ in range(symbols)])


def grammar(
    rule_SS: Tensor,
    first: int,
    length: int,
    gap: tuple[int, int],
    fillers: int,
    restart: float,
    num_rows: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Rows of `length` tokens: the mark, then fillers, then from token `first` on the symbols."""
    inputs = torch.randint(1, 1 + fillers, (num_rows, length), generator=generator)
    targets = torch.full((num_rows, length), IGNORED)
    before, last = torch.randint(len(rule_SS), (2, num_rows), generator=generator)
    at, each = torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows)
    for number in range(-(-length // (gap[0] + 1))):
        at = at + torch.randint(gap[0], gap[1] + 1, (num_rows,), generator=generator)
        drawn = torch.randint(len(rule_SS), (num_rows,), generator=generator)
        is_ruled = (torch.rand(num_rows, generator=generator) >= restart) & (number >= 2)
        symbol = torch.where(is_ruled, rule_SS[before, last], drawn)
        # a mark whose symbol falls behind the end is still a question
        asked = is_ruled & (at < length)
        inputs[each[asked], at[asked]] = MARK
        targets[each[asked], at[asked]] = first + symbol[asked]
        at = at + is_ruled
        shown = at < length
        inputs[each[shown], at[shown]] = first + symbol[shown]
        before, last, at = last, symbol, at + 1
    return inputs, targets
