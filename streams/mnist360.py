"""MNIST-360: two digits at a time, all turning, with no boundary anywhere: general continual learning.

Nine digits (a 9 would turn into a 6) come in pairs (0, 1), (1, 2), ..., (8, 0), three rounds of them. Every class turns
by 360 / n_c degrees with each of its images, n_c images of class c, starting at (c - 1) * 60, and goes through a sixth
of its images in each of its six pairs. The stream is one experience; with `has_boundaries` each of the 27 pairs is.

Source: Buzzega et al., "Dark Experience for General Continual Learning", NeurIPS 2020, as in aimagelab/mammoth
datasets/mnist_360.py, at the commit that holds the published numbers: images of a pair are drawn with replacement, each
batch is shared out in proportion to what the two classes have left, and a pair ends when one of them has none left.
Test images of each class turn once through 360 degrees.
Differences: the stream does not know the batch size, so `shared_rows` must be set to it for exactly mammoth's batches,
and a batch may still reach over the end of a pair; every test image is shown once, in an order drawn by seed, where
mammoth draws its test batches with replacement; `final` is the mean over classes, and theirs over images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cl.core import Data, EvalSet, Experience, Setting, Stream, StreamInfo, TensorData, UserError
from cl.seeding import derive_seed
from streams._images import Images
from streams._mixed import in_order
from streams._options import image_stream
from streams._settings import require_flag, require_integer
from streams._turned import turned

NUM_CLASSES, NUM_ROUNDS = 9, 3
FIRST_ANGLE, DEGREES = 60.0, 360.0


@dataclass(frozen=True)
class Turn:
    """Two digits that are shown together.

    Args:
        classes: the two.
        slices: which sixth of its images each goes through.
        order: (N,) 0 or 1, whose image comes next.
        shown: how many images each had shown before.
    """

    classes: tuple[int, int]
    slices: tuple[range, range]
    order: Tensor
    shown: tuple[int, int]

    @property
    def name(self) -> str:
        return "digits {} {}".format(*self.classes)


def turns(sizes: list[int], shared_rows: int = 1) -> Iterator[Turn]:
    """The 27 pairs.

    Args:
        sizes: [9] images of each class.
        shared_rows: images that the two classes share out at a time.
    """
    used, shown = [0] * NUM_CLASSES, [0] * NUM_CLASSES
    for k in range(NUM_ROUNDS * NUM_CLASSES):
        pair = (k % NUM_CLASSES, (k + 1) % NUM_CLASSES)
        slices = _slice(sizes[pair[0]], used[pair[0]]), _slice(sizes[pair[1]], used[pair[1]])
        order = interleaved(len(slices[0]), len(slices[1]), shared_rows)
        yield Turn(pair, slices, order, (shown[pair[0]], shown[pair[1]]))
        for place, c in enumerate(pair):
            used[c] += 1
            shown[c] += int((order == place).sum())


def _slice(size: int, use: int) -> range:
    """The sixth of a class that its next use takes: from the last, which is the shortest, to the first."""
    length = size // (2 * NUM_ROUNDS) + 1
    k = 2 * NUM_ROUNDS - 1 - use
    return range(k * length, min((k + 1) * length, size))


def interleaved(first: int, second: int, shared_rows: int = 1) -> Tensor:
    """Whose image comes next: so many at a time, in proportion to what is left, until one class has none left.

    With one at a time that is the class with more left, so the larger one comes alone until the two are equal.

    Example:
        >>> interleaved(5, 2).tolist(), interleaved(5, 2, shared_rows=4).tolist()
        ([0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0, 1])
    """
    order: list[int] = []
    while first > 0 and second > 0:
        # Python rounds a half to the even neighbour, and so does mammoth
        of_first = min(round(first / (first + second) * shared_rows), first)
        of_second = min(shared_rows - of_first, second)
        order += [0] * of_first + [1] * of_second
        first, second = first - of_first, second - of_second
    return torch.tensor(order, dtype=torch.int64)


@image_stream
def mnist360(images: Images, has_boundaries: bool = False, shared_rows: int = 16, seed: int = 0) -> Stream:
    """Build the stream; images are turned when an experience is loaded.

    Args:
        images: in the place of this argument a call gives the arguments of `open_images`.
        has_boundaries: every pair is an experience; otherwise the whole stream is one, and a strategy is told nothing.
        shared_rows: images that two classes share out at a time: mammoth's batch size.
        seed: of the images that are drawn, and of the order of the test images.

    Raises:
        UserError: fewer than nine classes, or so few images that a class has less than six parts.
    """
    require_flag("stream.has_boundaries", has_boundaries)
    require_integer("stream.shared_rows", shared_rows)
    sizes = images.targets.bincount(minlength=NUM_CLASSES).tolist()[:NUM_CLASSES]
    if images.num_classes < NUM_CLASSES or any(len(_slice(size, 0)) == 0 for size in sizes):
        raise UserError(
            f"stream.dataset is {images.name} with {sizes} rows of its first classes; mnist360 needs nine classes with "
            "enough rows for six parts each, so raise stream.train_rows"
        )
    every = list(turns(sizes, shared_rows))
    shows = _Shows(images, every, seed)
    names = [_domain(c) for c in range(NUM_CLASSES)]
    if has_boundaries:
        experiences = [shows.experience(k, turn.name, [k]) for k, turn in enumerate(every)]
    else:
        experiences = [shows.experience(0, "nine digits turning", range(len(every)))]
    counts = images.eval_targets.bincount(minlength=NUM_CLASSES).tolist()
    eval_sets = [EvalSet(names[c], partial(shows.held_out, c), counts[c]) for c in range(NUM_CLASSES) if counts[c]]
    name = "mnist360" if images.name == "mnist" else f"{images.name}360"
    info = StreamInfo(name, Setting.CLASS_INCREMENTAL, images.shape, images.num_classes, len(experiences))
    return Stream(info, experiences, eval_sets, images.transform, images.augment)


def _domain(c: int) -> str:
    return f"digit {c}"


@dataclass(frozen=True, eq=False)
class _Shows:
    """What all experiences share."""

    images: Images
    turns: list[Turn]
    seed: int

    def experience(self, k: int, name: str, numbers: range | list[int]) -> Experience:
        classes = tuple(dict.fromkeys(c for n in numbers for c in self.turns[n].classes))
        return Experience(
            id=k,
            name=name,
            domain=name,
            load=partial(self.load, k, list(numbers)),
            num_samples=sum(len(self.turns[n].order) for n in numbers),
            classes=classes,
            order=in_order,
            practises=tuple(_domain(c) for c in sorted(classes)),
        )

    def load(self, k: int, numbers: list[int]) -> Data:
        """The images of some pairs, in the order in which they are shown."""
        pieces = [self.piece(n) for n in numbers]
        whole = TensorData.concat(pieces)
        return replace(whole, experience_id=k)

    def piece(self, number: int) -> TensorData:
        turn, targets = self.turns[number], self.images.targets
        picks = torch.empty(len(turn.order), dtype=torch.int64)
        angles = torch.empty(len(turn.order), dtype=torch.float64)
        for place, c in enumerate(turn.classes):
            (mine,) = (turn.order == place).nonzero(as_tuple=True)
            of_class = (targets == c).nonzero().squeeze(1)
            part = of_class[list(turn.slices[place])]
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "drawn", number, place))
            picks[mine] = part[torch.randint(len(part), (len(mine),), generator=generator)]
            step = turn.shown[place] + torch.arange(len(mine), dtype=torch.float64)
            angles[mine] = (c - 1) * FIRST_ANGLE + step * (DEGREES / len(of_class))
        return TensorData(turned(self.images.inputs.index_select(0, picks), angles), targets.index_select(0, picks))

    def held_out(self, c: int) -> Data:
        rows = (self.images.eval_targets == c).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "held out", c))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        angles = torch.arange(len(rows), dtype=torch.float64) * (DEGREES / len(rows))
        inputs = turned(self.images.eval_inputs.index_select(0, rows), angles)
        return TensorData(inputs, self.images.eval_targets.index_select(0, rows))
