"""A benchmark of Avalanche as a stream of ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl.core import Batch, Data, EvalSet, Experience, Setting, Stream, StreamInfo, TensorData, UserError
from cl.interop._benchmark import OurExperience
from cl.interop._fetch import columns, fast_fetching
from cl.interop._quiet import quiet

MEMORY_BYTES = 2 << 30
"""Rows that had to be fetched one by one are kept up to this size, over all streams of the process."""
BATCH_SIZE = 512
PROBED_ROWS, PROBES = 8, 3
"""Rows that are fetched so many times to see whether their transforms are random."""


@dataclass(frozen=True)
class Source:
    """A data set of theirs and what its rows are called here.

    Args:
        heads: label of a task -> head of the model; empty where there are no tasks.
    """

    dataset: Any
    experience_id: int
    heads: tuple[tuple[int, int], ...]
    num_workers: int

    def batch(self, found: Sequence[Tensor], index: Tensor) -> Batch:
        """Columns of theirs (input, class, ..., task) as a batch of ours."""
        inputs = found[0] if found[0].is_floating_point() else found[0].float()
        owner = torch.tensor(self.experience_id).expand(len(index))
        return Batch(inputs, found[1].long(), owner, index, self._task_id(found, len(index)))

    def _task_id(self, found: Sequence[Tensor], num_rows: int) -> Tensor | None:
        if not self.heads:
            return None
        labels, tasks = zip(*self.heads, strict=True)
        place = torch.searchsorted(torch.tensor(labels), found[-1].long().contiguous())
        return torch.tensor(tasks)[place].expand(num_rows)


class Gathered:
    """Rows that are in memory already: many are gathered at once."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.dataset)

    def rows(self, index: Tensor) -> Batch:
        found = columns(self.source.dataset, index)
        assert found is not None, "the data set changed after it was looked at"
        return self.source.batch(found, index)


class Fetched:
    """Rows that are fetched by a data loader each time: random transforms, or more than fits in memory."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.dataset)

    def rows(self, index: Tensor) -> Batch:
        dataset, workers = self.source.dataset, self.source.num_workers
        parts = [part.tolist() for part in index.split(BATCH_SIZE)]
        with quiet(), fast_fetching():
            loader = DataLoader(dataset, batch_sampler=parts, num_workers=workers, collate_fn=dataset.collate_fn)
            found = [torch.cat(pieces) for pieces in zip(*loader, strict=True)]
        return self.source.batch(found, index)


_held: OrderedDict[int, tuple[Any, TensorData]] = OrderedDict()
"""Data sets and their rows, the least recently used first; the data set itself keeps its number from being reused."""


def load(source: Source) -> Data:
    """The rows of a data set, in the fastest form that shows what Avalanche would show."""
    if columns(source.dataset, torch.zeros(1, dtype=torch.int64)) is not None:
        return Gathered(source)
    key = id(source.dataset)
    if key in _held:
        _held.move_to_end(key)
        return _held[key][1]
    first = source.dataset[0][0]
    num_bytes = first.numel() * 4 * len(source.dataset)
    if num_bytes > MEMORY_BYTES or is_random(source.dataset):
        return Fetched(source)
    rows = Fetched(source).rows(torch.arange(len(source.dataset)))
    heads = rows.task_id
    task_id = int(heads[0]) if heads is not None and bool((heads == heads[0]).all()) else heads
    _make_room(num_bytes)
    _held[key] = source.dataset, TensorData(rows.inputs, rows.targets, source.experience_id, task_id)
    return _held[key][1]


def _make_room(num_bytes: int) -> None:
    while _held and sum(data.inputs.nbytes for _, data in _held.values()) + num_bytes > MEMORY_BYTES:
        _held.popitem(last=False)


def is_random(dataset: Any) -> bool:
    """Whether fetching a row twice gives different inputs, as with augmentation."""
    rows = range(min(PROBED_ROWS, len(dataset)))
    with torch.random.fork_rng():
        shown = []
        for probe in range(PROBES):
            torch.manual_seed(probe)
            shown.append(torch.stack([torch.as_tensor(dataset[row][0]) for row in rows]))
    return not all(torch.equal(shown[0], again) for again in shown[1:])


def from_avalanche(
    benchmark: Any,
    *,
    test: Iterable[Any] | None = None,
    name: str | None = None,
    setting: str | None = None,
    num_workers: int = 0,
) -> Stream:
    """A benchmark of Avalanche as a stream of ours; task labels, classes and their order are kept.

    Rows in tensors are gathered as they are; rows behind deterministic transforms are fetched once and kept in memory
    when they fit; others are fetched by a data loader each time. An experience of an online or repeating stream is
    measured on the test experience it comes from, or on the only one there is.

    Args:
        benchmark: with a `train_stream` and a `test_stream`, or only a stream to train on.
        test: experiences to measure on; None takes the benchmark's `test_stream`.
        name: of the stream; the class of the benchmark when None.
        setting: task_incremental, class_incremental or domain_incremental; None decides by what there is: several task
            labels, else classes that differ between experiences.
        num_workers: of the data loader, where one is needed.

    Raises:
        UserError: it holds no training data, items that are not (tensor, class, ...), or another setting is asked for.
    """
    train = list(getattr(benchmark, "train_stream", benchmark))
    tests = list(getattr(benchmark, "test_stream", ()) if test is None else test)
    if not train:
        raise UserError("the benchmark has no experiences to train on")
    if all(isinstance(experience, OurExperience) for experience in train):
        return train[0].stream
    shape = _input_shape(train[0].dataset)
    labels = sorted({label for experience in [*train, *tests] for label in _task_labels(experience)})
    every = [_classes(experience) for experience in train]
    chosen = _setting(setting, labels, every)
    heads = {label: head for head, label in enumerate(labels)} if chosen == Setting.TASK_INCREMENTAL else {}
    domains = [_domain(k, experience, tests, len(train)) for k, experience in enumerate(train)]
    experiences = []
    for k, (experience, classes) in enumerate(zip(train, every, strict=True)):
        own = [heads[label] for label in _task_labels(experience)] if heads else [None]
        source = Source(experience.dataset.train(), k, tuple(heads.items()), num_workers)
        domain = f"experience {k}" if domains[k] is None else f"experience {domains[k]}"
        load_rows = partial(load, source)
        experiences.append(
            Experience(k, f"experience {k}", domain, load_rows, len(experience.dataset), classes, own[0])
        )
    eval_sets = [
        EvalSet(
            f"experience {j}",
            partial(load, Source(each.dataset.eval(), _first(domains, j), tuple(heads.items()), num_workers)),
            len(each.dataset),
        )
        for j, each in enumerate(tests)
    ]
    num_outputs = 1 + max(c for classes in [*every, *map(_classes, tests)] for c in classes)
    info = StreamInfo(
        name or type(benchmark).__name__.lower(), chosen, shape, num_outputs, len(train), num_heads=max(1, len(heads))
    )
    return Stream(info, experiences, eval_sets)


def _input_shape(dataset: Any) -> tuple[int, ...]:
    with quiet():
        item = dataset.train()[0]
    if len(item) < 2 or not isinstance(item[0], Tensor):
        shown = ", ".join(type(part).__name__ for part in item)
        raise UserError(f"items of the benchmark are ({shown}); they must be (tensor, class, ...), so add a transform")
    return tuple(item[0].shape)


def _targets(dataset: Any) -> Iterable[Any]:
    if hasattr(dataset, "targets"):
        return getattr(dataset.targets, "uniques", dataset.targets)
    found = columns(dataset, torch.arange(len(dataset)))
    return [item[1] for item in dataset] if found is None else found[1].unique()


def _classes(experience: Any) -> tuple[int, ...]:
    return tuple(sorted({int(c) for c in _targets(experience.dataset)}))


def _task_labels(experience: Any) -> list[int]:
    labels = getattr(experience.dataset, "targets_task_labels", None)
    return [] if labels is None else sorted(int(label) for label in labels.uniques)


def _setting(asked: str | None, labels: Sequence[int], classes: Sequence[tuple[int, ...]]) -> Setting:
    allowed = [Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, *([Setting.TASK_INCREMENTAL] if labels else [])]
    if asked is not None:
        if asked not in list(allowed):
            without = "" if labels else "; the benchmark has no task labels"
            raise UserError(f"stream.setting is {asked!r}; it must be one of {', '.join(allowed)}{without}")
        return Setting(asked)
    if len(labels) > 1:
        return Setting.TASK_INCREMENTAL
    return Setting.DOMAIN_INCREMENTAL if len(set(classes)) == 1 else Setting.CLASS_INCREMENTAL


def _domain(k: int, experience: Any, tests: Sequence[Any], num_train: int) -> int | None:
    """Test experience that measures a training experience; None where no single one does."""
    with quiet():
        origin = getattr(experience, "origin_experience", None)
    if origin is not None and origin.current_experience < len(tests):
        return int(origin.current_experience)
    if len(tests) == num_train:
        return k
    if len(tests) == 1:
        return 0
    classes, labels = set(_classes(experience)), _task_labels(experience)
    covering = [j for j, test in enumerate(tests) if classes <= set(_classes(test)) and _task_labels(test) == labels]
    return covering[0] if covering else None


def _first(domains: Sequence[int | None], j: int) -> int:
    """The experience in which a domain is first taught."""
    return domains.index(j) if j in domains else 0
