"""Blurry boundaries: neighbouring experiences run into each other, or every experience holds some rows of all others.

gradual: over the last rows of an experience and as many first ones of the next, the share of the next one's rows rises
linearly from 0 to 1 and is 1/2 at the boundary. Rows then come in that order, in every epoch.
mixed: every experience gives away a share of its rows, in equal parts to all others.

Every row of the base stream is shown once, and every experience keeps its number of rows.

Source: gradual changes between tasks as in Zeno et al., "Task agnostic continual learning using online variational
Bayes", 2018 (linear instead of their smooth mixture); mixed is the "blurry-M" setting of Aljundi et al., "Gradient
based sample selection", 2019, and Bang et al., "Rainbow Memory", CVPR 2021.
Differences: both are written for class-incremental streams and here also mix domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cl.core import Data, Experience, Order, Setting, Stream, UserError
from cl.seeding import derive_seed
from streams._mixed import Drawn, draw, in_order, require_base
from streams._settings import require_choice

SETTINGS = (Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL)

KINDS = ("gradual", "mixed")


def blurry(base: Stream, kind: str = "gradual", blur: float = 0.2, seed: int = 0) -> Stream:
    """Blur the boundaries of a stream; rows are drawn when an experience is loaded.

    Args:
        base: class- or domain-incremental stream.
        kind: gradual or mixed.
        blur: gradual: the part of its rows at either end over which an experience runs into its neighbour, as a share
            of half the smaller of the two; mixed: the share of its rows that an experience gives away. In (0, 1].
        seed: of the order of the rows, and of which of them change sides.

    Raises:
        UserError: a value outside its range, a base that cannot be mixed, or one with a single experience.
    """
    stream = require_base(base, "blurry", SETTINGS)
    require_choice("stream.kind", kind, KINDS)
    if not isinstance(blur, int | float) or isinstance(blur, bool) or not 0 < blur <= 1:
        raise UserError(f"stream.blur is {blur!r}; it must be above 0 and at most 1")
    every = list(stream.experiences)
    if len(every) < 2:
        raise UserError(f"stream.base is {stream.info.name} with one experience; a boundary to blur needs two")
    smallest = min(each.num_samples for each in every)
    if kind == "mixed" and smallest < len(every) - 1:
        raise UserError(
            f"stream.kind is 'mixed', and the smallest experience of {stream.info.name} has {smallest} rows, less than "
            f"one for each of the {len(every) - 1} others"
        )
    origins = gradual if kind == "gradual" else mixed
    places = origins([each.num_samples for each in every], blur, seed)
    shown, is_gradual = _Shown(every, places), kind == "gradual"
    return replace(
        stream,
        info=replace(stream.info, name=f"{kind}_{stream.info.name}"),
        experiences=[shown.experience(k, in_order if is_gradual else each.order) for k, each in enumerate(every)],
    )


def gradual(sizes: Sequence[int], blur: float, seed: int) -> list[Tensor]:
    """For each experience, in order, the place of its rows in the base stream counted from its first row.

    Args:
        sizes: rows of each experience.

    Example:
        >>> [len(places) for places in gradual([6, 4], 0.5, seed=0)]
        [6, 4]
    """
    starts = torch.tensor([0, *sizes]).cumsum(0)
    order = torch.cat([starts[k] + _permutation(size, seed, "order", k) for k, size in enumerate(sizes)])
    for k, (left, right) in enumerate(pairwise(sizes), start=1):
        width = int(blur * min(left, right) / 2)
        if width == 0:
            continue
        near = slice(int(starts[k]) - width, int(starts[k]) + width)
        is_new = _ramp(width, _generator(seed, "sides", k))
        old, new = order[near].clone().split(width)
        order[near][~is_new], order[near][is_new] = old, new
    return list(order.split(list(sizes)))


def _ramp(width: int, generator: torch.Generator) -> Tensor:
    """(2w,) which places go to the new experience: place p with probability (p + 1/2) / 2w, and w of them in all.

    A place and its mirror image take opposite sides, which keeps both the probabilities and the number.
    """
    share = (torch.arange(width) + 0.5) / (2 * width)
    early = torch.rand(width, generator=generator) < share
    return torch.cat([early, ~early.flip(0)])


def mixed(sizes: Sequence[int], blur: float, seed: int) -> list[Tensor]:
    """As `gradual`; what an experience gives away goes round, so that it gets back as many rows as it gave.

    Equal numbers go to each of the others where experiences are equally large; of unequal ones the smallest decides how
    many each can give.
    """
    T = len(sizes)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    parts = max(1, int(blur * min(sizes) / (T - 1)))
    rows = [starts[k] + _permutation(size, seed, "order", k) for k, size in enumerate(sizes)]
    given = [own[: parts * (T - 1)].split(parts) for own in rows]
    kept = [own[parts * (T - 1) :] for own in rows]
    # the d-th part of experience k goes to the d-th experience after it
    got = [torch.cat([given[(k - d) % T][d - 1] for d in range(1, T)]) for k in range(T)]
    return [torch.cat(pair) for pair in zip(kept, got, strict=True)]


def _generator(seed: int, *names: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def _permutation(size: int, seed: int, *names: str | int) -> Tensor:
    return torch.randperm(size, generator=_generator(seed, *names))


@dataclass(frozen=True, eq=False)
class _Shown:
    """What all experiences share: the base, and which of all its rows each of them shows."""

    base: list[Experience]
    places: list[Tensor]

    @property
    def starts(self) -> Tensor:
        return torch.tensor([0, *(each.num_samples for each in self.base)]).cumsum(0)

    def experience(self, k: int, order: Order) -> Experience:
        owners = self.owners(k).unique().tolist()
        return replace(
            self.base[k],
            load=partial(self.load, k),
            classes=tuple(sorted({c for j in owners for c in self.base[j].classes})),
            order=order,
            practises=tuple(self.base[j].domain for j in owners),
        )

    def owners(self, k: int) -> Tensor:
        """The base experience of each row."""
        return torch.searchsorted(self.starts, self.places[k], right=True) - 1

    def load(self, k: int) -> Data:
        owners = self.owners(k)
        local = self.places[k] - self.starts[owners]
        picks = [(j, local[owners == j]) for j in owners.unique().tolist()]
        # `draw` gives one experience after the other; back to the order of the rows
        rows = draw(self.base, picks).batch[owners.argsort(stable=True).argsort()]
        # every row is shown once, so here is where it is first seen
        rows.experience_id = torch.full((len(rows),), k)
        rows.sample_ids = torch.arange(len(rows))
        return Drawn(rows)
