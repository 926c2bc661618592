"""Which classes each experience of a SCoLe stream has: pure functions of their arguments and a generator."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, cycle, islice
from math import comb

import torch
from torch import Tensor

from cl.core import UserError

KINDS = ("random", "halves", "forgetting", "cycle", "couples", "iid")
WEIGHTED = ("random", "halves")
"""Kinds that draw classes by their probabilities."""


def class_probabilities(num_classes: int, entropy_decrease: float, generator: torch.Generator) -> Tensor:
    """How often each class is drawn; the larger `entropy_decrease`, the more unequal.

    p_i ~ ((1 - i f) / C)^e, f = 0.05 (0.01 with 100 classes), classes in random order; uniform for e = 0

    Example:
        >>> class_probabilities(2, 0.0, torch.Generator()).tolist()
        [0.5, 0.5]
    """
    if entropy_decrease == 0:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    # the published step of 0.05 would reach 0 at the 20th class
    step = 0.05 if num_classes < 20 else 1 / num_classes
    falling = 1 - step * torch.arange(num_classes, dtype=torch.float64)
    weights = (falling / falling.sum()) ** entropy_decrease
    return (weights / weights.sum())[torch.randperm(num_classes, generator=generator)]


def subsets(
    kind: str,
    num_experiences: int,
    num_classes: int,
    size: int,
    generator: torch.Generator,
    *,
    entropy_decrease: float = 0.0,
    prob_reduction: float = 1.0,
    replaced_frac: float = 0.0,
    couples_frac: float = 1.0,
) -> Iterator[tuple[int, ...]]:
    """The classes of each experience, in rising order; the arguments are those of `streams.scole.scole`."""
    probabilities = class_probabilities(num_classes, entropy_decrease, generator)
    if kind == "iid":
        yield from [tuple(range(num_classes))] * num_experiences
    elif kind == "cycle":
        yield from _cycle(num_experiences, num_classes, size, replaced_frac, generator)
    elif kind == "couples":
        yield from _couples(num_experiences, num_classes, size, couples_frac, generator)
    else:
        half = num_classes // 2
        for k in range(num_experiences):
            is_late = 2 * k >= num_experiences
            among = probabilities.clone()
            if kind == "halves":
                among[:half] *= not is_late
                among[half:] *= is_late
            elif kind == "forgetting" and is_late:
                among[half:] = 0
            if int((among > 0).sum()) < size:
                raise UserError(
                    f"stream.entropy_decrease={entropy_decrease!r} and stream.prob_reduction={prob_reduction!r} leave "
                    f"experience {k} fewer than {size} classes with a probability above 0; take smaller ones"
                )
            drawn = torch.multinomial(among, size, generator=generator)
            # for good: a class seen more often than its turn becomes rarer and rarer
            probabilities[drawn] /= prob_reduction
            probabilities /= probabilities.sum()
            yield tuple(sorted(drawn.tolist()))


def _cycle(
    num_experiences: int, num_classes: int, size: int, replaced_frac: float, generator: torch.Generator
) -> Iterator[tuple[int, ...]]:
    """All subsets in lexical order, over and over; each class of each is replaced by any class with a probability."""
    for _, subset in zip(range(num_experiences), cycle(combinations(range(num_classes), size)), strict=False):
        classes = torch.tensor(subset)
        is_replaced = torch.rand(size, generator=generator) < replaced_frac
        others = torch.randint(num_classes, (size,), generator=generator)
        yield tuple(sorted(set(torch.where(is_replaced, others, classes).tolist())))


def _couples(
    num_experiences: int, num_classes: int, size: int, couples_frac: float, generator: torch.Generator
) -> Iterator[tuple[int, ...]]:
    """A share of all subsets, chosen once; each experience draws one of them."""
    count = num_couples(num_classes, size, couples_frac)
    # by number, so that a million subsets need no list
    numbers = torch.randperm(comb(num_classes, size), generator=generator)[:count].tolist()
    wanted = set(numbers)
    chosen = [s for i, s in enumerate(islice(combinations(range(num_classes), size), max(wanted) + 1)) if i in wanted]
    for _ in range(num_experiences):
        yield chosen[int(torch.randint(count, (), generator=generator))]


def num_couples(num_classes: int, size: int, couples_frac: float) -> int:
    """How many different subsets can occur.

    Example:
        >>> num_couples(10, 2, 0.2)
        9
    """
    return int(couples_frac * comb(num_classes, size) + 1e-9)
