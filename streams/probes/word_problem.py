"""State tracking: multiply group elements one after another, and say after each what the product is.

    inputs   g1 g2 g3 ...        targets   g1, g1 g2, g1 g2 g3, ...

Z2 is parity; S3, A4, S4, A5 and S5 are permutations. Rows are short in training and longer where it is measured: a
network that carries the state goes on as before, one that has learnt short cuts does not. No diagonal recurrence with
positive decays can hold parity, and none with a commutative transition the words of S5. With all elements as letters a
network must first learn their whole table of products, 14,400 entries in S5; with the swaps of neighbours, which reach
every permutation, 480.

Source: Merrill, Petty & Sabharwal, "The Illusion of State in State-Space Models", 2024 (A5, S5); Grazzi et al.,
    "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024 (parity). Differences: lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import permutations

import torch
from torch import Generator, Tensor

from cl.core import IGNORED, Setting, Stream
from streams._settings import require_choice, require_integer
from streams.probes._sequences import Part, probe, require_integers

GROUPS = {"z2": (2, False), "s3": (3, False), "a4": (4, True), "s4": (4, False), "a5": (5, True), "s5": (5, False)}
"""Name -> number of things that are permuted, and whether by even permutations only."""
ASKED = ("every", "last")
LETTERS = ("all", "swaps")
WITH_SWAPS = ("s3", "s4", "s5")
"""An even group has none, and words of the only one of z2 would all be alike."""


def word_problem(
    group: str = "s5",
    lengths: Sequence[int] = (16,),
    test_lengths: Sequence[int] = (32, 64, 128, 256),
    asked: str = "every",
    letters: str = "all",
    train_rows: int = 20_000,
    eval_rows: int = 500,
    seed: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        group: z2, s3, a4, s4, a5 or s5.
        lengths: tokens of a row, of each experience.
        test_lengths: further ones to measure on.
        asked: the product after "every" token, or only after the "last" one.
        letters: what words are made of: "all" elements, or "swaps" of two neighbours (s3, s4, s5).
        train_rows, eval_rows: of every experience, and of every domain.

    Raises:
        UserError: a value outside its range.
    """
    require_choice("stream.group", group, tuple(GROUPS))
    require_choice("stream.asked", asked, ASKED)
    require_choice("stream.letters", letters, LETTERS)
    if letters == "swaps":
        require_choice("stream.group (of words of swaps)", group, WITH_SWAPS)
    chosen = require_integers("lengths", lengths)
    further = require_integers("test_lengths", test_lengths) if test_lengths else []
    for name, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        require_integer(f"stream.{name}", value, smallest=4)

    def part(length: int, num_rows: int, filled_to: int = 0) -> Part:
        return Part(f"{group} words of {length}", partial(words, group, length, asked, letters), num_rows, filled_to)

    train = [part(length, train_rows, max(chosen)) for length in chosen]
    test = [part(length, eval_rows) for length in dict.fromkeys(chosen + further)]
    return probe("word_problem", Setting.CONTINUAL_PRETRAINING, len(elements(group)), train, test, seed)


@lru_cache(maxsize=8)
def elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of a group in lexicographic order, the identity first.

    Example:
        >>> elements("z2"), len(elements("a5")), len(elements("s5"))
        ([(0, 1), (1, 0)], 60, 120)
    """
    size, is_even = GROUPS[group]
    every = list(permutations(range(size)))
    return [each for each in every if not is_even or _inversions(each) % 2 == 0]


def _inversions(permutation: tuple[int, ...]) -> int:
    return sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :])


@lru_cache(maxsize=8)
def table(group: str) -> Tensor:
    """(n, n) number of the product g after f, (g f)(x) = g(f(x)), at [f, g].

    Example:
        >>> table("z2").tolist()
        [[0, 1], [1, 0]]
    """
    every = elements(group)
    number = {each: i for i, each in enumerate(every)}
    return torch.tensor([[number[tuple(g[x] for x in f)] for g in every] for f in every])


@lru_cache(maxsize=8)
def swaps(group: str) -> Tensor:
    """Numbers of the permutations that swap two neighbours and leave the rest.

    Example:
        >>> [elements("s3")[i] for i in swaps("s3")]
        [(0, 2, 1), (1, 0, 2)]
    """
    return torch.tensor([i for i, each in enumerate(elements(group)) if _inversions(each) == 1])


def words(
    group: str, length: int, asked: str, letters: str, num_rows: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Rows of `length` letters, drawn alike."""
    product = table(group)
    alphabet = swaps(group) if letters == "swaps" else torch.arange(len(product))
    inputs = alphabet[torch.randint(len(alphabet), (num_rows, length), generator=generator)]
    targets = inputs.clone()
    for t in range(1, length):
        targets[:, t] = product[targets[:, t - 1], inputs[:, t]]
    if asked == "last":
        targets[:, :-1] = IGNORED
    return inputs, targets
