"""The losses of a text run over the tokens that it was trained on, with the learning rate it had, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from cl.metrics.matrix import FloatArray
from cl.result import Result

MAX_DOMAINS = 12
"""Domains up to which each has a line."""


@dataclass(frozen=True)
class ByTokens:
    """Curves over tokens, mean over seeds, of all domains.

    Args:
        tokens: [N] trained on; 0 is before training.
        values: [D, N] loss in nats; NaN where not measured.
        ends: tokens at which experiences end.
        rate_at, rate: [M] tokens, and the learning rate there; at the border of two experiences that of the last step
            and that of the next, so that a line through all jumps where the schedule does.
    """

    tokens: list[int]
    values: FloatArray
    ends: list[int]
    rate_at: list[int]
    rate: list[float]
    num_seeds: int


def by_tokens(runs: Sequence[Result]) -> ByTokens | None:
    """The curves of the runs of one strategy; None where none kept its course, or more than `MAX_DOMAINS` are measured.

    Seeds are averaged where all of them were measured: on text their batches hold the same numbers of tokens.
    """
    used = [run for run in runs if run.course and run.R]
    if not used or len(used[0].domains) > MAX_DOMAINS:
        return None
    rows = [_rows(run) for run in used]
    tokens = sorted(set.intersection(*(set(row) for row in rows)))
    if len(tokens) < 2:
        return None
    values = np.mean([[row[token] for token in tokens] for row in rows], axis=0)
    first = used[0]
    ends = {int(experience): int(at) for experience, _, at, _ in first.course if 0 <= experience < len(first.R)}
    rate_at, rate = zip(*_rates(first), strict=True)
    return ByTokens(tokens, values.T, sorted(ends.values()), list(rate_at), list(rate), len(used))


def _rates(run: Result) -> list[tuple[int, float]]:
    """Tokens and the learning rate there: at the start of each experience, and wherever it was kept."""
    found: list[tuple[int, float]] = []
    trained = [point for point in run.course if point[0] >= 0 and point[2] > 0]
    for _, points in groupby(trained, key=itemgetter(0)):
        kept = {int(at): float(rate) for _, _, at, rate in points}
        found += [(found[-1][0] if found else 0, next(iter(kept.values()))), *kept.items()]
    return found


def _rows(run: Result) -> dict[int, FloatArray]:
    """Tokens -> [D] losses: before training, inside experiences and at their ends."""
    width, at = len(run.domains), {int(step): int(tokens) for _, step, tokens, _ in run.course}
    ends = {int(experience): int(tokens) for experience, _, tokens, _ in run.course}
    rows: dict[int, FloatArray] = {}
    for experience, row in [(-1, run.R_init or []), *enumerate(run.R)]:
        if experience in ends and any(value is not None for value in row):
            rows[ends[experience]] = np.array([np.nan if value is None else value for value in row])
    for _, step, domain, value in run.within:
        if int(step) in at:
            rows.setdefault(at[int(step)], np.full(width, np.nan))[int(domain)] = value
    return rows
