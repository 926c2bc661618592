"""What the probes share: rows drawn by a law when they are asked for, and the stream that is made of such laws.

Rows are drawn a block at a time, each block from a seed of its own, so that a run draws no more than it trains on: a
few steps on a probe of 100,000 rows cost a few blocks. Every row is drawn independently of the others, so the first
epoch takes them as they come; later ones shuffle.

A probe of tokens has the setting `continual_pretraining` with the measure "accuracy": loss and accuracy are taken where
a target is given, everywhere else it is `cl.core.IGNORED`. A label of a whole row is then a target at its last token,
so that the same networks, strategies and metrics serve both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cl.core import (
    IGNORED,
    Batch,
    Data,
    EvalSet,
    Experience,
    Setting,
    Stream,
    StreamInfo,
    TensorData,
    UserError,
    shuffled,
)
from cl.seeding import derive_seed
from streams._packing import as_ids
from streams._settings import require_integer

Law = Callable[[int, Generator], tuple[Tensor, Tensor]]
"""(number of rows, generator) -> inputs (N, T) or (N, T, D), targets (N, T) or (N,)."""

BLOCK = 256
"""Rows drawn at once."""
SHOWN = 4
"""Rows of each law that its digest is taken of."""


@dataclass(frozen=True)
class Part:
    """Rows of one law.

    Args:
        domain: what the rows measure; parts of one domain follow one law.
        num_rows: how many.
        length: rows are filled up to it at the end, with token 0 that is not asked for; 0 leaves them as drawn.
        task_id: head of the rows, where there are several.
    """

    domain: str
    law: Law
    num_rows: int
    length: int = 0
    task_id: int | None = None

    def load(self, seed: int, experience_id: int) -> Data:
        return Drawn(self, seed, experience_id)

    def drawn(self, num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `num_rows` rows, filled up at the end."""
        inputs, targets = self.law(num_rows, Generator().manual_seed(seed))
        if targets.dim() == 1:
            return inputs, targets
        missing = max(0, self.length - inputs.shape[1])
        return F.pad(inputs.int(), (0, missing)), F.pad(targets, (0, missing), value=IGNORED)


class Drawn:
    """Rows of a part, drawn when they are first asked for and kept from then on.

    Cost: of the first request for any row of a block, the law of `BLOCK` rows.
    """

    def __init__(self, part: Part, seed: int, experience_id: int) -> None:
        self.part, self.seed = part, seed
        self.missing = set(range(-(-part.num_rows // BLOCK)))
        # pages that are never written take no memory
        inputs, targets = (row.new_empty(part.num_rows, *row.shape[1:]) for row in part.drawn(1, seed))
        self.data = TensorData(inputs, targets, experience_id, part.task_id)

    def __len__(self) -> int:
        return self.part.num_rows

    def rows(self, index: Tensor) -> Batch:
        for number in self.missing.intersection((index // BLOCK).tolist()):
            place = slice(number * BLOCK, min((number + 1) * BLOCK, len(self)))
            drawn = self.part.drawn(place.stop - place.start, derive_seed(self.seed, number))
            self.data.inputs[place], self.data.targets[place] = drawn
            self.missing.discard(number)
        return self.data.rows(index)


def as_drawn(num_rows: int, epoch: int, generator: Generator) -> Tensor:
    """Every row once: in the first epoch as they are drawn, which is at random, and shuffled in the others."""
    return torch.arange(num_rows) if epoch == 0 else shuffled(num_rows, epoch, generator)


def probe(
    name: str,
    setting: Setting,
    num_outputs: int,
    train: Sequence[Part],
    test: Sequence[Part],
    seed: int,
) -> Stream:
    """The stream with one experience for each part of `train`; what it teaches is measured before the rest of `test`.

    Args:
        test: domains to measure on; a domain of `train` that is missing is measured on as many rows as the first of
            them.
    """
    columns = {part.domain: part for part in test}
    taught = {part.domain: part for part in train}
    for domain, part in taught.items():
        columns.setdefault(domain, Part(domain, part.law, test[0].num_rows, 0, part.task_id))
    measured = [columns[domain] for domain in (*taught, *(domain for domain in columns if domain not in taught))]
    first_seen = {domain: k for k, domain in reversed(list(enumerate(part.domain for part in train)))}
    experiences, eval_sets, digest = [], [], hashlib.sha256(repr((name, num_outputs, str(setting))).encode())
    for k, part in enumerate(train):
        own = derive_seed(seed, "train", part.domain, k)
        classes = () if setting == Setting.CONTINUAL_PRETRAINING else tuple(range(num_outputs))
        title = part.domain if first_seen[part.domain] == k else f"{part.domain} again {k}"
        load = partial(part.load, own, k)
        experiences.append(
            Experience(k, title, part.domain, load, part.num_rows, classes, part.task_id, order=as_drawn)
        )
        _add(digest, part, own)
    for part in measured:
        own = derive_seed(seed, "test", part.domain)
        load = partial(part.load, own, first_seen.get(part.domain, 0))
        eval_sets.append(EvalSet(part.domain, load, part.num_rows))
        _add(digest, part, own)
    info = StreamInfo(
        name,
        setting,
        tuple(train[0].drawn(1, 0)[0].shape[1:]),
        num_outputs,
        len(experiences),
        num_heads=len(taught) if setting == Setting.TASK_INCREMENTAL else 1,
    )
    content = digest.hexdigest()
    if setting == Setting.CONTINUAL_PRETRAINING:
        return Stream(info, experiences, eval_sets, as_ids, content=content)
    return Stream(info, experiences, eval_sets, content=content)


def _add(digest: hashlib._Hash, part: Part, seed: int) -> None:
    """A few rows tell whether the law still draws what it drew."""
    digest.update(repr((part.domain, part.num_rows, part.length, part.task_id)).encode())
    for column in part.drawn(min(SHOWN, part.num_rows), seed):
        digest.update(column.numpy().tobytes())


def require_table(name: str, value: object, columns: Sequence[str], smallest: int = 1) -> list[list[int]]:
    """A list of rows of integers, such as [[64, 4, 1000], [128, 8, 500]].

    Raises:
        UserError: it is none.
    """
    wanted = f"a list of [{', '.join(columns)}]"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"stream.{name} is {value!r}; it must be {wanted}")
    table = []
    for row in value:
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != len(columns):
            raise UserError(f"stream.{name} holds {row!r}; it must be {wanted}")
        for column, each in zip(columns, row, strict=True):
            require_integer(f"stream.{name}: {column}", each, smallest)
        table.append(list(row))
    return table


def require_integers(name: str, value: object, smallest: int = 1) -> list[int]:
    """A list of different integers.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"stream.{name} is {value!r}; it must be a list of integers of at least {smallest}")
    for each in value:
        require_integer(f"stream.{name}", each, smallest)
    if len(set(value)) != len(value):
        raise UserError(f"stream.{name} is {list(value)}; every number comes once")
    return list(value)


def without_replacement(num_rows: int, num_words: int, count: int, generator: Generator) -> Tensor:
    """(N, count) different numbers below `num_words` in each row, every choice and order as likely."""
    return torch.rand(num_rows, num_words, generator=generator).topk(count, 1).indices
