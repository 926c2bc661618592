"""What streams around other streams have in common: which base they take, and rows drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl.core import Batch, Experience, Setting, Stream, UserError, shuffled


@dataclass(frozen=True)
class Drawn:
    """Rows taken out of several data sets, each keeping its experience and its number there.

    Args:
        batch: every row, one after the other.
    """

    batch: Batch

    def __len__(self) -> int:
        return len(self.batch)

    def rows(self, index: Tensor) -> Batch:
        return self.batch[index]


def draw(experiences: Sequence[Experience], picks: Sequence[tuple[int, Tensor]]) -> Drawn:
    """The picked rows of each experience, one experience in memory at a time.

    Args:
        picks: (position in `experiences`, row numbers) in the order in which the rows are to stand.
    """
    return Drawn(Batch.cat([experiences[j].load().rows(index) for j, index in picks]))


def require_stream(base: object, family: str, settings: Sequence[Setting]) -> Stream:
    """The stream to wrap.

    Raises:
        UserError: no stream, one of a setting that the family cannot take, or one with row orders of its own.
    """
    if not isinstance(base, Stream):
        raise UserError(f"stream.base is {base!r}; it must be a stream (on the command line: stream@stream.base=NAME)")
    if base.info.setting not in settings:
        raise UserError(
            f"stream.base is {base.info.name} in the setting {base.info.setting}; {family} takes streams whose setting "
            f"is one of {', '.join(settings)}"
        )
    if any(experience.order is not shuffled for experience in base.experiences):
        raise UserError(
            f"stream.base is {base.info.name}, whose rows come in an order of their own; {family} takes a stream whose "
            "rows are shuffled, such as permuted_digits or split_digits"
        )
    return base


def require_base(base: object, family: str, settings: Sequence[Setting]) -> Stream:
    """The stream whose experiences are to be mixed.

    Raises:
        UserError: as `require_stream`; also for one that mixes experiences already.
    """
    base = require_stream(base, family, settings)
    if any(experience.practises for experience in base.experiences):
        raise UserError(
            f"stream.base is {base.info.name}, whose experiences share rows already; {family} takes a stream in which "
            "every experience has rows of its own, such as permuted_digits or split_digits"
        )
    return base


def passes(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the given rows: distinct ones, or where there are fewer, each as often as any other, give or take one.

    Example:
        >>> passes(torch.tensor([7, 8]), 5, torch.Generator().manual_seed(0)).bincount()[7:].sort().values.tolist()
        [2, 3]
    """
    whole, rest = divmod(count, len(rows))
    picked = rows[torch.randperm(len(rows), generator=generator)[:rest]]
    return torch.cat([rows.repeat(whole), picked])


def in_order(num_rows: int, epoch: int, generator: torch.Generator) -> Tensor:
    """Every row once, as the data set has them: for experiences whose order is their content."""
    return torch.arange(num_rows)
