"""A stream of random images of 28x28 bytes, for what is timed and needs no data set."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cl.core import EvalSet, Experience, Setting, Stream, StreamInfo, TensorData

EVAL_ROWS = 64


def in_unit_interval(raw: Tensor) -> Tensor:
    """Bytes -> [0, 1]."""
    return raw / 255


def images(k: int, num_rows: int, setting: Setting = Setting.DOMAIN_INCREMENTAL) -> TensorData:
    """Rows of experience k; labels are what the setting makes of it."""
    generator = torch.Generator().manual_seed(k)
    raw = torch.randint(256, (num_rows, 1, 28, 28), dtype=torch.uint8, generator=generator)
    low, width = (3 * k, 3) if setting == Setting.CLASS_INCREMENTAL else (0, 10)
    targets = low + torch.randint(width, (num_rows,), generator=generator)
    return TensorData(raw, targets, k, k if setting == Setting.TASK_INCREMENTAL else None)


def stream_of(num_experiences: int, num_rows: int, setting: Setting = Setting.DOMAIN_INCREMENTAL) -> Stream:
    """Experiences of so many rows each; class-incremental ones bring three classes, at most three of them."""
    is_task, is_class = setting == Setting.TASK_INCREMENTAL, setting == Setting.CLASS_INCREMENTAL
    experiences, eval_sets = [], []
    for k in range(num_experiences):
        classes = tuple(range(3 * k, 3 * k + 3)) if is_class else tuple(range(10))
        load, task_id = partial(images, k, num_rows, setting), k if is_task else None
        experiences.append(Experience(k, f"{k}", f"{k}", load, num_rows, classes, task_id))
        eval_sets.append(EvalSet(f"{k}", partial(images, k, EVAL_ROWS, setting), EVAL_ROWS))
    heads = num_experiences if is_task else 1
    info = StreamInfo("random images", setting, (1, 28, 28), 10, num_experiences, heads)
    return Stream(info, experiences, eval_sets, in_unit_interval)
