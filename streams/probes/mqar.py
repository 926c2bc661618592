"""Multi-query associative recall: pairs of key and value, then keys alone, each to be answered with its value.

    inputs   k1 v1 k2 v2 . . k2 . . . k1 .        targets at the asked keys: v2 ... v1

A key is asked once, at a gap that follows a power law, p(gap = i) ~ i^(power - 1): soon after the pairs more often than
late. Tokens between are drawn from the whole vocabulary, so that a key may be read where nothing is asked.

Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023; laws and sizes of
    zoology/data/multiquery_ar.py and original_mqar_configs.py in HazyResearch/zoology. Differences: zoology mixes the
    lengths; here each is an experience (strategy=joint mixes them), and shorter rows are filled up with tokens that are
    not asked for. Tokens between are drawn from the stream's own generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from cl.core import IGNORED, Setting, Stream, UserError
from streams._settings import require_flag, require_integer
from streams.probes._sequences import Part, probe, require_table, without_replacement

TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
MOST_POWER = 20
"""Beyond it hardly any gap but the longest ones has a chance that is a number."""
TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


def mqar(
    train: Sequence[Sequence[int]] = TRAIN,
    test: Sequence[Sequence[int]] = TEST,
    vocabulary: int = 8192,
    power: float = 0.01,
    is_filled: bool = True,
    eval_rows: int = 1000,
    seed: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        train: [tokens of a row, pairs, rows] of each experience.
        test: [tokens of a row, pairs] of further rows to measure on.
        vocabulary: keys are 1 to half of it, values the other half; token 0 is neither.
        power: of the gaps; 1 asks everywhere alike.
        is_filled: tokens between are drawn; otherwise they are 0.
        eval_rows: of every domain.

    Raises:
        UserError: a value outside its range, or pairs that do not fit.
    """
    chosen = require_table("train", train, ("tokens", "pairs", "rows"))
    further = require_table("test", test, ("tokens", "pairs")) if test else []
    require_common(vocabulary, power, is_filled, eval_rows)
    length = max(tokens for tokens, _, _ in chosen)
    wanted = dict.fromkeys((tokens, pairs) for tokens, pairs, *_ in [*chosen, *further])
    for tokens, pairs in wanted:
        require_room(tokens, pairs, 0, vocabulary)

    def part(tokens: int, pairs: int, num_rows: int, filled_to: int = 0) -> Part:
        law = partial(recall, tokens, pairs, 0, vocabulary, power, is_filled)
        return Part(f"{pairs} pairs in {tokens}", law, num_rows, filled_to)

    taught = [part(tokens, pairs, num_rows, length) for tokens, pairs, num_rows in chosen]
    measured = [part(tokens, pairs, eval_rows) for tokens, pairs in wanted]
    return probe("mqar", Setting.CONTINUAL_PRETRAINING, vocabulary, taught, measured, seed)


def require_common(vocabulary: object, power: object, is_filled: object, eval_rows: object) -> None:
    """Raise `UserError` for a value outside its range."""
    require_integer("stream.vocabulary", vocabulary, smallest=4)
    require_integer("stream.eval_rows", eval_rows, smallest=4)
    require_flag("stream.is_filled", is_filled)
    if not isinstance(power, int | float) or isinstance(power, bool) or not 0 < power <= MOST_POWER:
        raise UserError(f"stream.power is {power!r}; it must be a number above 0 and at most {MOST_POWER}")


def require_room(tokens: int, pairs: int, updates: int, vocabulary: int) -> None:
    """Whether the pairs, those that come again and the questions fit a row, and the vocabulary has enough keys.

    Raises:
        UserError: they do not.
    """
    smallest = 2 * (pairs + updates) + 2 * pairs
    if tokens % 2 or tokens < smallest:
        raise UserError(
            f"rows of {tokens} tokens do not hold {pairs} pairs, {updates} of them twice, and their questions; an even "
            f"number of at least {smallest} is needed"
        )
    if pairs > vocabulary // 2 - 1:
        raise UserError(f"stream.vocabulary is {vocabulary}, too few for {pairs} keys; at least {2 * pairs + 2} is")


def recall(
    tokens: int,
    pairs: int,
    updates: int,
    vocabulary: int,
    power: float,
    is_filled: bool,
    num_rows: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Rows in which `updates` of the keys come a second time with another value, and the last one counts."""
    first_value = vocabulary // 2
    keys = 1 + without_replacement(num_rows, first_value - 1, pairs, generator)
    values = first_value + without_replacement(num_rows, vocabulary - first_value, pairs, generator)
    shown = torch.stack((keys, values), 2).flatten(1)
    if updates:
        which = without_replacement(num_rows, pairs, updates, generator)
        num_values = vocabulary - first_value
        # any value but the first one of that key
        offset = torch.randint(1, num_values, (num_rows, updates), generator=generator)
        later = first_value + (values.gather(1, which) - first_value + offset) % num_values
        shown = torch.cat((shown, torch.stack((keys.gather(1, which), later), 2).flatten(1)), 1)
        values = values.scatter(1, which, later)
    context = shown.shape[1]
    space = (tokens - context) // 2
    chance = torch.arange(1, space + 1, dtype=torch.float64) ** (power - 1)
    gaps = torch.multinomial(chance.expand(num_rows, space), pairs, replacement=False, generator=generator)
    inputs = torch.zeros(num_rows, tokens, dtype=torch.int64)
    inputs[:, :context] = shown
    asked = context + 2 * gaps
    inputs.scatter_(1, asked, keys)
    targets = torch.full((num_rows, tokens), IGNORED).scatter_(1, asked, values)
    if is_filled:
        drawn = torch.randint(vocabulary, (num_rows, tokens), generator=generator)
        inputs = torch.where(inputs == 0, drawn, inputs)
    return inputs, targets
