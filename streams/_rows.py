"""Which rows of a data set a stream trains on and measures on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cl.core import UserError
from cl.seeding import derive_seed
from streams._images import Images


def choose_rows(
    images: Images, seed: int, train_rows: int | None, eval_rows: int | None, eval_on: str, validation_frac: float
) -> Images:
    """The rows that `open_images` is asked for; what is used whole is not copied.

    Raises:
        UserError: so few rows that a class could be missing.
    """
    count, num_classes = len(images.targets), images.num_classes
    train = stratified_order(images.targets, derive_seed(seed, "train rows"))
    if eval_on == "validation":
        num_held_out = round(validation_frac * count)
        if not num_classes <= num_held_out <= count - num_classes:
            raise UserError(
                f"stream.validation_frac is {validation_frac!r}, which holds out {num_held_out} of {count} rows of "
                f"{images.name}; both parts need one row of each of {num_classes} classes"
            )
        held_out, train, pool = train[:num_held_out], train[num_held_out:], images.part(is_train=True)
    else:
        pool = images.part(is_train=False)
        held_out = stratified_order(pool[1], derive_seed(seed, "eval rows"))
    for name, limit in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        if limit is not None and limit < num_classes:
            raise UserError(
                f"stream.{name} is {limit}; it must be at least {num_classes}, one row of each class of {images.name}"
            )
    inputs, targets = _taken(images.part(is_train=True), train[:train_rows])
    eval_inputs, eval_targets = _taken(pool, held_out[:eval_rows])
    return replace(images, inputs=inputs, targets=targets, eval_inputs=eval_inputs, eval_targets=eval_targets)


def _taken(part: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` of both tensors, in the order of the files."""
    inputs, targets = part
    if len(rows) == len(targets):
        return part
    rows = rows.sort().values
    return inputs[rows], targets[rows]


def stratified_order(targets: Tensor, seed: int) -> Tensor:
    """All rows in an order drawn by `seed`, in which every first part holds the classes in their share.

    Example:
        >>> targets = torch.tensor([0] * 40 + [1] * 20)
        >>> targets[stratified_order(targets, seed=0)[:30]].bincount().tolist()
        [20, 10]
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(targets), generator=generator)
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    counts = targets.bincount()
    place = torch.arange(len(targets)) - (counts.cumsum(0) - counts)[targets[by_class]]
    quantile = torch.empty(len(targets))
    quantile[by_class] = (place + 0.5) / counts[targets[by_class]]
    # the shuffle decides between rows of equal quantile, so that no class is preferred
    return shuffled[quantile[shuffled].argsort(stable=True)]
