"""What every image stream can be asked for: which rows, how many, padded, standardised, augmented."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.core import Stream, UserError
from cl.seeding import derive_seed
from streams._augment import AUGMENTS
from streams._images import LOADERS, Images, load_images
from streams._settings import require_choice, require_integer


def open_images(
    dataset: str = "digits",
    seed: int = 0,
    *,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    eval_on: str = "test",
    validation_frac: float = 0.1,
    pad: int = 0,
    standardise: bool = False,
    augment: str = "none",
    root: str | None = None,
    download: bool = False,
) -> Images:
    """The images a stream shows, as asked for. Every image stream takes these arguments beside its own.

    Rows are drawn by `seed`, every class in its share; a smaller draw is part of a larger one.

    Args:
        dataset: digits, mnist, fashion_mnist, kmnist, cifar10 or cifar100.
        train_rows, eval_rows: rows of the data set that are used at most; None uses all.
        eval_on: measure on the data set's "test" rows, or, to tune without touching them, on a "validation" part of
            the training rows, which is then not trained on.
        validation_frac: share of the training rows in that part.
        pad: zero pixels added on every side, before anything else happens to an image.
        standardise: shift and scale pixels to mean 0 and deviation 1 over the data set's training rows, by channel;
            otherwise they are in [0, 1].
        augment: "none", "crop" (random crop after padding by 4 pixels) or "crop_flip" (also a random horizontal flip).
        root: folder of torchvision's data sets; the digits need none.
        download: fetch a data set that is not there.

    Raises:
        UserError: a value outside its range, or a data set that cannot be read.
    """
    require_choice("stream.dataset", dataset, sorted(LOADERS))
    require_choice("stream.eval_on", eval_on, ("test", "validation"))
    require_choice("stream.augment", augment, tuple(AUGMENTS))
    require_integer("stream.pad", pad, smallest=0)
    whole = images = load_images(dataset, root, download)
    for name, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        if value is not None:
            require_integer(f"stream.{name}", value)
    held_out = 0
    if eval_on == "validation":
        if not 0 < validation_frac < 1:
            raise UserError(f"stream.validation_frac is {validation_frac!r}; it must be between 0 and 1")
        held_out = max(1, round(validation_frac * len(whole.targets)))
        images = replace(images, eval_inputs=whole.inputs, eval_targets=whole.targets)
    order = partial(stratified_order, whole.targets, derive_seed(seed, "rows"))
    if held_out or train_rows is not None:
        rows = order()[held_out:][:train_rows].sort().values
        images = replace(images, inputs=whole.inputs[rows], targets=whole.targets[rows])
    if held_out:
        rows = order()[:held_out][:eval_rows].sort().values
        images = replace(images, eval_inputs=whole.inputs[rows], eval_targets=whole.targets[rows])
    elif eval_rows is not None:
        rows = stratified_order(whole.eval_targets, derive_seed(seed, "eval rows"))[:eval_rows].sort().values
        images = replace(images, eval_inputs=whole.eval_inputs[rows], eval_targets=whole.eval_targets[rows])
    if pad:
        inputs, eval_inputs = (F.pad(part, (pad,) * 4) for part in (images.inputs, images.eval_inputs))
        images = replace(images, inputs=inputs, eval_inputs=eval_inputs)
    transform = _standardised(whole) if standardise else partial(scaled, scale=1 / whole.largest)
    make_augment = AUGMENTS[augment]
    blank = transform(torch.zeros(1, *images.shape, dtype=torch.uint8))
    return replace(images, transform=transform, augment=make_augment and make_augment(blank[:, :, :1, :1]))


def stratified_order(targets: Tensor, seed: int) -> Tensor:
    """All rows in an order drawn by `seed`, in which every first part holds the classes in their share.

    Example:
        >>> order = stratified_order(torch.tensor([0] * 40 + [1] * 20), seed=0)
        >>> torch.tensor([0] * 40 + [1] * 20)[order[:30]].bincount().tolist()
        [20, 10]
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(targets), generator=generator)
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    counts = targets.bincount()
    first = counts.cumsum(0) - counts
    classes = targets[by_class]
    quantile = (torch.arange(len(targets)) - first[classes] + 0.5) / counts[classes]
    return by_class[quantile.argsort(stable=True)]


def scaled(raw: Tensor, scale: float | Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """uint8 pixels -> float32 `raw * scale + shift`; the first product converts, so that bytes are read once."""
    inputs = torch.mul(raw, scale)
    return inputs if isinstance(shift, float) and shift == 0 else inputs.add_(shift)


def _standardised(images: Images) -> Callable[[Tensor], Tensor]:
    pixels = images.inputs.transpose(0, 1).flatten(1)
    values = torch.arange(256, dtype=torch.float64)
    scales, shifts = [], []
    for channel in pixels:
        share = channel.bincount(minlength=256) / channel.numel()
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum().sqrt()
        scales.append(1 / std)
        shifts.append(-mean / std)
    if len(pixels) == 1:
        return partial(scaled, scale=float(scales[0]), shift=float(shifts[0]))
    scale, shift = (torch.stack(column).float().view(-1, 1, 1) for column in (scales, shifts))
    return partial(scaled, scale=scale, shift=shift)


def image_stream(build: Callable[..., Stream]) -> Callable[..., Stream]:
    """Let `build(images, ..., seed)` be called with the arguments of `open_images` in place of the images.

    The shared options then have one signature, one docstring and one default each; the result's own signature lists
    all of them, so that commands and tracking see every value.
    """
    shared = inspect.signature(open_images).parameters
    dataset, *options = (p for name, p in shared.items() if name != "seed")
    own = list(inspect.signature(build).parameters.values())[1:]
    signature = inspect.signature(build).replace(parameters=[dataset, *own, *options])

    @wraps(build)
    def stream(*args: Any, **kwargs: Any) -> Stream:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        images = open_images(**{name: bound.arguments[name] for name in shared})
        return build(images, **{p.name: bound.arguments[p.name] for p in own})

    stream.__signature__ = signature  # type: ignore[attr-defined]
    return stream
