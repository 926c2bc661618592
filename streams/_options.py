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

from cl.core import Stream
from streams._augment import AUGMENTS
from streams._images import LOADERS, Images, load_images
from streams._rows import choose_rows
from streams._settings import require_choice, require_flag, require_fraction, require_integer


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
    require_fraction("stream.validation_frac", validation_frac)
    require_flag("stream.standardise", standardise)
    require_integer("stream.pad", pad, smallest=0)
    for name, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        if value is not None:
            require_integer(f"stream.{name}", value)
    whole = load_images(dataset, root, download)
    transform = _standardised(whole) if standardise else partial(scaled, scale=1 / whole.largest)
    images = choose_rows(whole, seed, train_rows, eval_rows, eval_on, validation_frac)
    if pad:
        inputs, eval_inputs = (F.pad(part, (pad,) * 4) for part in (images.inputs, images.eval_inputs))
        images = replace(images, inputs=inputs, eval_inputs=eval_inputs)
    change = AUGMENTS[augment]
    if change is not None:
        black = transform(torch.zeros(1, images.shape[0], 1, 1, dtype=torch.uint8))
        change = partial(change, fill=black)
    return replace(images, transform=transform, augment=change)


def scaled(raw: Tensor, scale: float | Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """uint8 pixels -> float32 `raw * scale + shift`; one allocation, scaled in place."""
    if isinstance(scale, Tensor) and isinstance(shift, Tensor):
        scale, shift = scale.to(raw.device), shift.to(raw.device)
    inputs = raw.to(torch.float32).mul_(scale)
    return inputs.add_(shift) if isinstance(shift, Tensor) or shift else inputs


def _standardised(images: Images) -> Callable[[Tensor], Tensor]:
    """`scaled` to mean 0 and deviation 1, from the histogram of each channel: exact, and no float copy of the data."""
    values = torch.arange(256, dtype=torch.float64)
    scales, shifts = [], []
    for channel in images.inputs.unbind(1):
        share = channel.flatten().bincount(minlength=256) / channel.numel()
        mean = (share * values).sum()
        deviation = (share * (values - mean) ** 2).sum().sqrt()
        scales.append(1 / deviation)
        shifts.append(-mean / deviation)
    if len(scales) == 1:
        return partial(scaled, scale=float(scales[0]), shift=float(shifts[0]))
    scale, shift = (torch.stack(column).float().view(-1, 1, 1) for column in (scales, shifts))
    return partial(scaled, scale=scale, shift=shift)


def image_stream(build: Callable[..., Stream]) -> Callable[..., Stream]:
    """Let `build(images, ..., seed)` be called with the arguments of `open_images` in place of the images.

    The shared options then have one signature, one docstring and one default each; the result's own signature lists
    all of them, so that commands and tracking see every value.
    """
    shared = inspect.signature(open_images).parameters
    dataset, *options = (parameter for name, parameter in shared.items() if name != "seed")
    own = list(inspect.signature(build).parameters.values())[1:]
    signature = inspect.signature(build).replace(parameters=[dataset, *own, *options])

    @wraps(build)
    def stream(*args: Any, **kwargs: Any) -> Stream:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        images = open_images(**{name: bound.arguments[name] for name in shared})
        return build(images, **{parameter.name: bound.arguments[parameter.name] for parameter in own})

    stream.__signature__ = signature  # type: ignore[attr-defined]
    return stream
