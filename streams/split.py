"""Split images: every experience brings new classes.

class_incremental: one head over all classes, and the rows keep their labels.
task_incremental: a head per experience, rows are labelled by the place of their class within the experience.
domain_incremental: the same labels, but one head that all experiences share (split MNIST: first or second digit).

Source: van de Ven & Tolias, "Three scenarios for continual learning", 2019. Classes are taken in order 0, 1, 2, ... as
in mammoth's S-MNIST; others draw the order by seed (`class_order=shuffled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from cl.core import Setting, Stream, UserError
from cl.seeding import derive_seed
from streams._images import Images
from streams._options import image_stream
from streams._settings import Piece, assemble, is_list, require_integer, require_setting

SETTINGS = (Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL, Setting.DOMAIN_INCREMENTAL)


@image_stream
def split(
    images: Images,
    num_experiences: int = 5,
    setting: str = "class_incremental",
    classes_per_experience: Sequence[int] | None = None,
    class_order: str | Sequence[int] = "fixed",
    seed: int = 0,
) -> Stream:
    """Build the stream; rows are picked when an experience is loaded.

    Args:
        images: in the place of this argument a call gives the arguments of `open_images`.
        num_experiences: must divide the number of classes, unless `classes_per_experience` is given.
        setting: class_incremental, task_incremental or domain_incremental.
        classes_per_experience: number of classes of each experience, such as [50, 10, 10, 10, 10, 10]; with unequal
            numbers, heads are as wide as the largest experience.
        class_order: "fixed" takes classes in order, "shuffled" draws the order by seed; or a list of all classes.
        seed: of a shuffled order, and of the choice of rows.

    Raises:
        UserError: the classes cannot be divided as asked.
    """
    require_integer("stream.num_experiences", num_experiences)
    kind = require_setting(setting, SETTINGS)
    order = _class_order(class_order, images.num_classes, seed)
    sizes = _sizes(num_experiences, classes_per_experience, images.num_classes)
    is_local = kind != Setting.CLASS_INCREMENTAL
    if is_local and min(sizes) < 2:
        raise UserError(
            f"stream.num_experiences is {num_experiences}, which leaves an experience with one class only: nothing to "
            f"tell apart in the {setting} setting; take fewer experiences or class_incremental"
        )
    num_outputs = max(sizes) if is_local else images.num_classes
    return assemble(
        "split", images, kind, num_outputs, _pieces(images, _divided(order, sizes), is_local, class_order == "shuffled")
    )


def _class_order(wanted: str | Sequence[int], num_classes: int, seed: int) -> list[int]:
    if wanted == "fixed":
        return list(range(num_classes))
    if wanted == "shuffled":
        generator = torch.Generator().manual_seed(derive_seed(seed, "class order"))
        return torch.randperm(num_classes, generator=generator).tolist()
    # false and 0.0 equal 0, and are no class
    if is_list(wanted, num_classes) and all(type(c) is int for c in wanted) and set(wanted) == set(range(num_classes)):
        return list(wanted)
    raise UserError(
        f"stream.class_order is {wanted!r}; it must be fixed, shuffled, or a list that names every class from 0 to "
        f"{num_classes - 1} once"
    )


def _sizes(num_experiences: int, wanted: Sequence[int] | None, num_classes: int) -> list[int]:
    """How many classes each experience brings."""
    if wanted is None:
        if num_classes % num_experiences:
            divisors = [n for n in range(1, num_classes + 1) if num_classes % n == 0]
            raise UserError(
                f"stream.num_experiences is {num_experiences}, which does not divide {num_classes} classes; it must be "
                f"one of {', '.join(map(str, divisors))}, or give stream.classes_per_experience as a list"
            )
        return [num_classes // num_experiences] * num_experiences
    if not isinstance(wanted, Sequence) or isinstance(wanted, str):
        raise UserError(f"stream.classes_per_experience is {wanted!r}; it must be a list, such as [4,2,2,2]")
    sizes = list(wanted)
    for size in sizes:
        require_integer("an entry of stream.classes_per_experience", size)
    if len(sizes) != num_experiences or sum(sizes) != num_classes:
        raise UserError(
            f"stream.classes_per_experience is {sizes}; it must have stream.num_experiences={num_experiences} entries "
            f"that add up to {num_classes} classes"
        )
    return sizes


def _divided(order: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    start = 0
    for size in sizes:
        yield tuple(order[start : start + size])
        start += size


def _pieces(images: Images, groups: Iterator[tuple[int, ...]], is_local: bool, is_drawn: bool) -> Iterator[Piece]:
    counts, eval_counts = (
        targets.bincount(minlength=images.num_classes).tolist() for targets in (images.targets, images.eval_targets)
    )
    for number, classes in enumerate(groups):
        yield Piece(
            _name(classes),
            partial(_view, images, classes, is_local),
            sum(counts[c] for c in classes),
            sum(eval_counts[c] for c in classes),
            tuple(range(len(classes))) if is_local else classes,
            domain=f"part {number:02d}" if is_drawn else "",
        )


def _name(classes: Sequence[int]) -> str:
    """Few classes are listed; the first one alone would do to tell experiences apart, since they share none."""
    shown = " ".join(map(str, classes[:5])) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
    return f"{'class' if len(classes) == 1 else 'classes'} {shown}"


def _view(images: Images, classes: tuple[int, ...], is_local: bool, is_train: bool) -> tuple[Tensor, Tensor]:
    inputs, targets = images.part(is_train)
    label = torch.full((images.num_classes,), -1)
    label[list(classes)] = torch.arange(len(classes)) if is_local else torch.tensor(classes)
    labels = label[targets]
    rows = (labels >= 0).nonzero().squeeze(1)
    return inputs.index_select(0, rows), labels.index_select(0, rows)
