"""A stream of ours as a benchmark of Avalanche."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl.core import Batch, Data, EvalSet, Experience, Setting, Stream, TensorData, UserError
from cl.interop._fetch import Columns, Leaf
from cl.interop._quiet import quiet

with quiet():
    from avalanche.benchmarks.scenarios import CLScenario, DatasetExperience, SequenceCLStream
    from avalanche.benchmarks.utils import TaskAwareSupervisedClassificationDataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
    from avalanche.benchmarks.utils.flat_data import ConstantSequence

ROWS_AT_A_TIME = 4096


class Rows(Leaf, Dataset[tuple[Tensor, int]]):
    """The rows of one experience, or of one set to measure on, as the network reads them.

    Read one at a time they are not augmented; whole batches for training are, with draws from torch's global generator.

    Args:
        place: which rows these are, such as "train/3".
    """

    def __init__(self, stream: Stream, data: Data, place: str = "") -> None:
        self.stream, self.data, self.place = stream, data, place

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        inputs, targets = self.columns(torch.tensor([row]), is_train=False)
        return inputs[0], int(targets)

    def columns(self, index: Tensor, is_train: bool) -> Columns:
        rows = self.stream.prepare(self.data.rows(index), torch.default_generator if is_train else None)
        return [rows.inputs, rows.targets]

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor | int]:
        """Class of every row, and its task: 0 where there are none."""
        data = self.data
        if isinstance(data, TensorData):
            return data.targets, 0 if data.task_id is None else data.task_id
        parts = [data.rows(some) for some in torch.arange(len(data)).split(ROWS_AT_A_TIME)]
        tasks = [part.task_id for part in parts if part.task_id is not None]
        return torch.cat([part.targets for part in parts]), torch.cat(tasks) if tasks else 0


def as_dataset(rows: Rows, num_rows: int | None = None) -> TaskAwareSupervisedClassificationDataset:
    """Rows of ours as a data set of theirs, of (input, class, task).

    Args:
        num_rows: the first rows only.
    """
    targets, tasks = rows.labels
    labels = ConstantSequence(tasks, len(rows)) if isinstance(tasks, int) else tasks.tolist()
    with quiet():
        dataset = TaskAwareSupervisedClassificationDataset(
            [rows], data_attributes=[DataAttribute(targets.tolist(), "targets"), TaskLabels(labels)]
        )
    if num_rows is None or num_rows >= len(rows):
        return dataset
    return dataset.subset(list(range(num_rows)))


class OurExperience(DatasetExperience):
    """An experience of theirs with the attributes that classic benchmarks have, made from one of ours.

    Args:
        source: the experience or eval set of ours, whose rows are `data`.
        position: of the experience whose classes and task it has.
    """

    def __init__(self, stream: Stream, source: Experience | EvalSet, data: Data, position: int, dataset: Any) -> None:
        super().__init__(dataset=dataset)
        self.stream, self.source, self.data = stream, source, data
        experiences = list(stream.experiences)
        here, past = set(experiences[position].classes), _classes(experiences[:position])
        self.task_label = experiences[position].task_id or 0
        self.task_labels = [self.task_label]
        self.classes_in_this_experience = sorted(here)
        self.previous_classes = sorted(past)
        self.classes_seen_so_far = sorted(past | here)
        self.future_classes = sorted(_classes(experiences[position + 1 :]) - past - here)

    @property
    def benchmark(self) -> Any:
        return self.origin_stream.benchmark


class OurStream(SequenceCLStream):
    """Experiences of theirs, made one at a time; the last one asked for is kept, since strategies ask again."""

    def __init__(self, name: str, stream: Stream, sources: Sequence[Any], num_rows: int | None = None) -> None:
        self.source, self.items, self.num_rows = stream, list(sources), num_rows
        self._made: dict[int, OurExperience] = {}
        super().__init__(name, benchmark=None)

    def _full_length(self) -> int:
        return len(self.items)

    def rows(self, k: int) -> Rows:
        return Rows(self.source, self.items[k].load(), f"{self.name}/{k}")

    def _make_experience(self, experience_idx: int) -> OurExperience:
        if experience_idx not in self._made:
            self._made.clear()
            item = self.items[experience_idx]
            rows = self.rows(experience_idx)
            dataset = as_dataset(rows, self.num_rows)
            taught = [e.id for e in self.source.experiences if e.domain == item.domain]
            position = item.id if isinstance(item, Experience) else (taught or [0])[0]
            self._made[experience_idx] = OurExperience(self.source, item, rows.data, position, dataset)
        return self._made[experience_idx]


def as_benchmark(stream: Stream, eval_rows: int | None = None) -> CLScenario:
    """A stream of ours as a benchmark of Avalanche, with a train stream and a test stream.

    The rows are prepared as the network reads them, task labels and the order of classes are kept, and nothing is
    loaded before an experience is asked for.

    Args:
        eval_rows: rows of each set in the test stream; None takes all.

    Raises:
        UserError: the stream is of text, which Avalanche's data sets have no labels for.

    Example:
        >>> from cl.core import Setting
        >>> from cl.testing import toy_stream
        >>> benchmark = as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL))
        >>> [experience.classes_in_this_experience for experience in benchmark.train_stream]
        [[0, 1], [2, 3], [4, 5]]
    """
    if stream.info.setting == Setting.CONTINUAL_PRETRAINING:
        raise UserError(f"stream {stream.info.name} is of text, and Avalanche's data sets have one class per row")
    train = OurStream("train", stream, stream.experiences)
    test = OurStream("test", stream, stream.eval_sets, eval_rows)
    benchmark = CLScenario([train, test])
    train.benchmark = test.benchmark = benchmark
    per_experience = [list(experience.classes) for experience in stream.experiences]
    # classes of the head that never come, as if in a last experience: strategies take the sum for the size of the head
    per_experience.append(sorted(set(range(stream.info.num_outputs)) - _classes(stream.experiences)))
    benchmark.n_classes = stream.info.num_outputs
    benchmark.n_classes_per_exp = [len(classes) for classes in per_experience]
    benchmark.classes_order = [c for classes in per_experience for c in classes]
    benchmark.stream = stream
    return benchmark


def _classes(experiences: Sequence[Experience]) -> set[int]:
    return {c for experience in experiences for c in experience.classes}


class Minibatch(list[Tensor]):
    """A batch of theirs that still knows the rows of ours it was made of."""

    rows: Batch


def minibatch(rows: Batch) -> Minibatch:
    """Prepared rows as the list (inputs, classes, tasks) that Avalanche unpacks."""
    tasks = rows.heads
    made = Minibatch([rows.inputs, rows.targets, tasks])
    made.rows = rows
    return made
