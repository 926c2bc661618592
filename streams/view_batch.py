"""View batches: fewer different rows per epoch, several views of each at once, and a longer rest in between.

A sampler around any stream of images. Rows are drawn in cycles of V epochs: a permutation of the N rows, each repeated
V times in a row, is cut into V epochs of N. So an epoch shows N / V rows, V views of each side by side; a cycle shows
every row once, in V views; and there are as many steps as without. Views 2 to V are augmented strongly. The loss that
ties the views together is the strategy `view_batch`.

Source: "Do Your Best and Get Enough Rest for Continual Learning", CVPR 2025, and hankyul2/ViewBatchModel
(datasets/utils/continual_dataset.py ViewBatchReplay, utils/training.py), whose sampler is timm's repeated augmentation.
Differences: theirs drops rows down to a multiple of 256 and cuts views of one row apart at the end of an epoch; here V
must divide the rows, or `remainder=drop` leaves out the fewest. Which rows are views of each other is told by their
sample ids; theirs takes neighbours of one label for views. Strong changes come before the stream's own augmentation and
work on the stored pixels; theirs come after, on pixels scaled back. Their options on rows of the buffer are about one
loader that mixes both; here a buffer's rows are never repeated. With fewer than V epochs some rows are never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cl.core import Batch, Data, Experience, Setting, Stream, UserError
from cl.seeding import derive_seed
from cl.state import first_views
from streams._mixed import require_stream
from streams._settings import require_choice, require_integer
from streams._strong import STRONG

SETTINGS = (Setting.TASK_INCREMENTAL, Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL)

REMAINDERS = ("refuse", "drop")


def view_batch(
    base: Stream, views: int = 4, strong: str = "auto_augment", remainder: str = "refuse", seed: int = 0
) -> Stream:
    """Show every row of a stream in several views at once, V times as rarely.

    Args:
        base: stream of images whose rows are shuffled.
        views: V; must divide the batch size.
        strong: auto_augment, rand_augment, turn_and_shift or none, for views 2 to V.
        remainder: what to do with rows beyond a multiple of V: "refuse" the stream, or "drop" them, drawn by seed.
        seed: of the order of the rows.

    Raises:
        UserError: V does not divide the rows, or the batch size; a base without images or with its own row order.
    """
    stream = require_stream(base, "view_batch", SETTINGS)
    require_integer("stream.views", views, smallest=2)
    require_choice("stream.strong", strong, tuple(STRONG))
    require_choice("stream.remainder", remainder, REMAINDERS)
    if len(stream.info.input_shape) != 3 and strong != "none":
        raise UserError(
            f"stream.strong is {strong!r}, which changes images, and rows of {stream.info.name} have the shape "
            f"{stream.info.input_shape}; it must be none"
        )
    return replace(
        stream,
        info=replace(stream.info, name=f"view_batch_{stream.info.name}"),
        experiences=[_repeated(each, views, remainder, seed) for each in stream.experiences],
        augment_rows=partial(_augmented, stream=stream, strong=strong, white=white_of(stream.transform)),
        check_batch=partial(_check_batch, views=views, base=stream.check_batch),
    )


def repeated(num_rows: int, epoch: int, generator: torch.Generator, views: int, seed: int) -> Tensor:
    """The rows of one epoch: N / V of them, each V times in a row.

    Args:
        generator: not used; the order must stay the same for the V epochs of a cycle, so it is drawn from `seed`.

    Example:
        >>> [repeated(4, epoch, torch.Generator(), views=2, seed=0).tolist() for epoch in range(2)]
        [[2, 2, 0, 0], [1, 1, 3, 3]]
    """
    cycle, part = divmod(epoch, views)
    permutation = torch.randperm(num_rows, generator=torch.Generator().manual_seed(derive_seed(seed, "cycle", cycle)))
    shown = num_rows // views
    return permutation[part * shown : (part + 1) * shown].repeat_interleave(views)


def white_of(transform: Callable[[Tensor], Tensor]) -> int:
    """The stored pixel value that shows white: what the transform makes 1, and 255 where pixels are standardised.

    Example:
        >>> white_of(lambda raw: raw / 16)
        16
    """
    black, one = transform(torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1, 1)).flatten(1)[:, 0].tolist()
    return round(1 / one) if black == 0 and 1 / 255 <= one <= 1 else 255


def _check_batch(batch_size: int, views: int, base: Callable[[int], None] | None) -> None:
    if batch_size % views:
        raise UserError(
            f"stream.views is {views}, which does not divide trainer.batch_size={batch_size}; views of a row must "
            "share a batch"
        )
    if base is not None:
        base(batch_size)


def _repeated(experience: Experience, views: int, remainder: str, seed: int) -> Experience:
    rest = experience.num_samples % views
    if rest and remainder == "refuse":
        raise UserError(
            f"stream.views is {views}, which does not divide the {experience.num_samples} rows of experience "
            f"{experience.id} ({experience.name!r}); let stream.remainder=drop leave out {rest} of them"
        )
    if views > experience.num_samples:
        raise UserError(
            f"stream.views is {views}, more than the {experience.num_samples} rows of experience {experience.id} "
            f"({experience.name!r})"
        )
    own_seed = derive_seed(seed, "views", experience.id)
    order = partial(repeated, views=views, seed=own_seed)
    if not rest:
        return replace(experience, order=order)
    kept = experience.num_samples - rest
    load = partial(_load_some, experience.load, kept, own_seed)
    return replace(experience, order=order, load=load, num_samples=kept)


@dataclass(frozen=True)
class _Some:
    """Some rows of a data set, numbered anew."""

    data: Data
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> Batch:
        return replace(self.data.rows(self.index.index_select(0, index)), sample_ids=index)


def _load_some(load: Callable[[], Data], count: int, seed: int) -> Data:
    data = load()
    generator = torch.Generator().manual_seed(derive_seed(seed, "kept"))
    return _Some(data, torch.randperm(len(data), generator=generator)[:count].sort().values)


def _augmented(batch: Batch, generator: torch.Generator, stream: Stream, strong: str, white: int) -> Tensor:
    """Inputs of a batch: later views changed strongly, then all of them as the base stream does it."""
    inputs, change = batch.inputs, STRONG[strong]
    is_later = first_views(batch) != torch.arange(len(batch), device=batch.sample_ids.device)
    if change is not None and batch.raw is not None and is_later.any():
        # policies are written for pixels up to 255
        changed = change(_scaled(batch.raw[is_later], 255 / white), generator)
        inputs = inputs.clone()
        inputs[is_later] = stream.transform(_scaled(changed, white / 255)).to(inputs.dtype)
    return inputs if stream.augment is None else stream.augment(inputs, generator)


def _scaled(raw: Tensor, factor: float) -> Tensor:
    return raw if factor == 1 else (raw * factor).round().to(torch.uint8)
