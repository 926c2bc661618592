"""Associative recall with keys that are given another value: the last one counts.

    inputs   k1 v1 k2 v2 k1 v3 . . k2 . . . k1 .        targets at the asked keys: v2 ... v3

Tells rules that overwrite (delta) from rules that add: what `mqar` asks of capacity, this asks of plasticity.

Source: zoology/data/forgetting_mqar.py and forgetting_configs.py in HazyResearch/zoology. Differences: as in `mqar`;
    and a new value always differs from the one it replaces, where zoology compares it with that of another key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cl.core import Setting, Stream, UserError
from streams.probes._sequences import Part, probe, require_table
from streams.probes.mqar import recall, require_common, require_room

TRAIN = ((64, 4, 4, 100_000), (128, 9, 4, 20_000), (256, 16, 4, 20_000), (256, 25, 4, 20_000), (256, 36, 4, 20_000))
TEST = ((64, 4, 4), (64, 9, 4), (128, 16, 4), (256, 36, 4), (512, 64, 4), (1024, 144, 4), (2048, 256, 4))


def forgetting_mqar(
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
        train: [tokens of a row, pairs, pairs that come again, rows] of each experience.
        test: [tokens of a row, pairs, pairs that come again] of further rows to measure on.
        vocabulary, power, is_filled, eval_rows: as in `mqar`.

    Raises:
        UserError: a value outside its range, or pairs that do not fit.
    """
    columns = ("tokens", "pairs", "updates")
    chosen = require_table("train", train, (*columns, "rows"), smallest=0)
    further = require_table("test", test, columns, smallest=0) if test else []
    require_common(vocabulary, power, is_filled, eval_rows)
    wanted = dict.fromkeys((tokens, pairs, updates) for tokens, pairs, updates, *_ in [*chosen, *further])
    for tokens, pairs, updates in wanted:
        if pairs < 1 or updates > pairs:
            raise UserError(f"{updates} of {pairs} keys cannot be given another value; at most all of them can")
        require_room(tokens, pairs, updates, vocabulary)
    if any(num_rows < 4 for *_, num_rows in chosen):
        raise UserError("stream.train: rows must be an integer of at least 4")
    length = max(tokens for tokens, *_ in chosen)

    def part(tokens: int, pairs: int, updates: int, num_rows: int, filled_to: int = 0) -> Part:
        law = partial(recall, tokens, pairs, updates, vocabulary, power, is_filled)
        return Part(f"{pairs} pairs, {updates} again, in {tokens}", law, num_rows, filled_to)

    taught = [part(tokens, pairs, updates, num_rows, length) for tokens, pairs, updates, num_rows in chosen]
    measured = [part(tokens, pairs, updates, eval_rows) for tokens, pairs, updates in wanted]
    return probe("forgetting_mqar", Setting.CONTINUAL_PRETRAINING, vocabulary, taught, measured, seed)
