"""What a setting means for a stream (heads and task labels), and the checks and the assembly that streams share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from cl.core import EvalSet, Experience, Setting, Stream, StreamInfo, TensorData, UserError
from streams._images import Images


def require_setting(value: str, allowed: Sequence[Setting]) -> Setting:
    require_choice("stream.setting", value, allowed)
    return Setting(value)


def require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in list(allowed):
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def require_integer(name: str, value: object, smallest: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least {smallest}")


def require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be true or false")


def require_fraction(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{name} is {value!r}; it must be a number between 0 and 1")


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_list(value: object, length: int) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list of that length; a string is not."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length


@dataclass(frozen=True)
class Piece:
    """One experience of an image stream: the same choice and view of the training rows and of the rows to measure on.

    Args:
        rows: is it training -> inputs, targets.
        num_samples, num_eval: rows for training and for measuring.
        classes: classes that occur, counted within the head.
        view: as in `TensorData`.
        domain: what results call it, where `name` holds what a seed drew; runs of different seeds are compared then.
    """

    name: str
    rows: Callable[[bool], tuple[Tensor, Tensor]]
    num_samples: int
    num_eval: int
    classes: tuple[int, ...]
    view: Callable[[Tensor], Tensor] | None = None
    domain: str = ""

    def load(self, is_train: bool, experience_id: int, task_id: int | None) -> TensorData:
        return TensorData(*self.rows(is_train), experience_id, task_id, self.view)


def assemble(family: str, images: Images, setting: Setting, num_outputs: int, pieces: Iterable[Piece]) -> Stream:
    """The stream of `pieces`; in the task-incremental setting every piece has a head of its own."""
    has_heads = setting == Setting.TASK_INCREMENTAL
    experiences, eval_sets = [], []
    for k, piece in enumerate(pieces):
        if piece.num_eval == 0:
            raise UserError(f"experience {k} ({piece.name!r}) has no rows of {images.name} to measure on")
        task_id = k if has_heads else None
        load, domain = partial(piece.load, experience_id=k, task_id=task_id), piece.domain or piece.name
        experiences.append(
            Experience(k, piece.name, domain, partial(load, True), piece.num_samples, piece.classes, task_id)
        )
        eval_sets.append(EvalSet(domain, partial(load, False), piece.num_eval))
    num_heads = len(experiences) if has_heads else 1
    info = StreamInfo(
        f"{family}_{images.name}", setting, images.shape, num_outputs, len(experiences), num_heads=num_heads
    )
    return Stream(info, experiences, eval_sets, images.transform, images.augment)


def unwritable(folder: Path, error: OSError) -> UserError:
    """What to raise where a folder of the cache cannot be written."""
    return UserError(
        f"{folder} cannot be written ({error.strerror}); name another folder for tokenised text with stream.cache or "
        "the variable CL_CACHE"
    )
