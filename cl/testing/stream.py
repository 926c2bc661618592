"""The contract of a stream, as a test class to inherit:

class TestMine(StreamContract):
    make = staticmethod(my_stream)
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from cl.core import IGNORED, Data, EvalSet, Experience, Setting, Stream, UserError
from cl.seeding import Seeds
from cl.state import tensor_bytes
from cl.testing.probe import equal

SAMPLE = 64
"""Rows looked at where a look at every row would take long."""


class StreamContract:
    """What every stream must keep.

    Class attributes:
        make: builds the stream; called with `arguments`, and with `seed` where it takes one.
        arguments: the smallest form of the stream, if its defaults are large.
        seeded_by: further arguments under which another seed gives other rows; None where no seed changes anything.
    """

    make: Callable[..., Stream]
    arguments: dict[str, Any] = {}
    seeded_by: dict[str, Any] | None = {}

    @cached_property
    def stream(self) -> Stream:
        return self.build()

    def build(self, **changes: Any) -> Stream:
        """The stream, with some arguments changed; skips the test when the data are not on this machine."""
        try:
            return type(self).make(**{**self.arguments, **changes})
        except UserError as error:
            if "data.root" in str(error):
                pytest.skip(str(error))
            raise

    def ends(self) -> list[Experience]:
        """First and last experience: enough to see what every one does."""
        experiences = self.stream.experiences
        return [experiences[0], experiences[-1]] if len(experiences) > 1 else [experiences[0]]

    # numbering and names

    def test_ids_count_from_zero(self) -> None:
        assert [experience.id for experience in self.stream.experiences] == list(range(len(self.stream.experiences)))
        assert len(self.stream.experiences) == self.stream.info.num_experiences

    def test_domains_are_measured(self) -> None:
        domains = [eval_set.domain for eval_set in self.stream.eval_sets]
        assert len(set(domains)) == len(domains), "one eval set per domain: a domain is a column of R"
        for experience in self.stream.experiences:
            taught = set(experience.practises) or {experience.domain}
            assert taught <= set(domains), f"every experience needs the eval sets of its domains, {taught}"

    # data

    def test_nothing_is_loaded_at_construction(self) -> None:
        """A stream of a thousand experiences needs the memory of one.

        Experiences may share a data set; what all of them hold beyond what the first one holds must be small. Pickles
        tell: what is shared is written once.
        """
        experiences = self.stream.experiences
        if len(experiences) == 1:
            pytest.skip("one experience has nothing to share")
        own_bytes = len(pickle.dumps(list(experiences))) - len(pickle.dumps([experiences[0]]))
        loaded = sum(tensor_bytes(_rows(e.load(), every=True)["inputs"]) for e in self.ends()) / 2
        assert own_bytes < 0.5 * loaded * (len(experiences) - 1), "experiences hold their rows before load() is called"

    def test_nothing_is_kept_after_loading(self) -> None:
        before = len(pickle.dumps(self.stream))
        for item in self._loadable():
            item.load()
        assert len(pickle.dumps(self.stream)) == before, (
            "load() must keep nothing; share a data set between experiences"
        )

    def test_announces_its_rows(self) -> None:
        items: list[Experience | EvalSet] = [*self.stream.experiences, *self.stream.eval_sets]
        empty = [item.domain for item in items if item.num_samples < 1]
        assert not empty, f"no rows in {empty}"
        for item in self._loadable():
            data = item.load()
            assert len(data) == item.num_samples, f"{item.domain!r} announces {item.num_samples} rows"
            assert len(data.rows(torch.arange(2))) == 2

    def test_rows_fit_the_backbone(self) -> None:
        """Targets are within the head, inputs have the announced shape, rows know where they come from."""
        info = self.stream.info
        for item in self._loadable():
            data = item.load()
            rows = self.stream.prepare(data.rows(_sample(len(data))))
            shape = tuple(rows.inputs.shape[1:])
            if isinstance(item, EvalSet) and info.setting == Setting.CONTINUAL_PRETRAINING:
                # a text may be measured at another length than it is trained at
                assert len(shape) == len(info.input_shape)
            else:
                assert shape == info.input_shape
            assert rows.inputs.dtype == (
                torch.int64 if info.setting == Setting.CONTINUAL_PRETRAINING else torch.float32
            )
            assert rows.targets.dtype == torch.int64
            learnt = rows.targets[rows.targets != IGNORED]
            assert 0 <= learnt.min() <= learnt.max() < info.num_outputs
            if info.num_heads > 1:
                assert rows.task_id is not None, "more than one head, but no task_id"
                assert 0 <= rows.task_id.min() <= rows.task_id.max() < info.num_heads
            else:
                assert rows.task_id is None, "one head, but a task_id"
            assert rows.raw is not None
            if getattr(item, "practises", ()):
                origins = list(zip(rows.experience_id.tolist(), rows.sample_ids.tolist(), strict=True))
                assert len(set(origins)) == len(origins), "experience_id and sample_ids tell rows apart"
            else:
                assert rows.sample_ids.tolist() == _sample(len(data)).tolist(), "sample_ids are row numbers"

    def test_experiences_say_what_they_hold(self) -> None:
        for experience in self.ends():
            data = experience.load()
            rows = data.rows(torch.arange(len(data)))
            # a revisit shows rows first seen in an earlier experience
            assert 0 <= rows.experience_id.min() <= rows.experience_id.max() <= experience.id
            if rows.task_id is not None:
                assert set(rows.task_id.tolist()) == {experience.task_id}
            if experience.classes:
                assert set(rows.targets.unique().tolist()) <= set(experience.classes)

    def test_order_covers_each_row_once_per_epoch(self) -> None:
        for experience in self.ends():
            for epoch in range(2):
                order = experience.order(experience.num_samples, epoch, torch.Generator().manual_seed(epoch))
                assert len(order) == experience.num_samples, "an epoch has as many rows as the experience"
                assert 0 <= order.min() <= order.max() < experience.num_samples
                if experience.order.__module__ == "cl.core":
                    assert len(order.unique()) == experience.num_samples

    # repeatability

    def test_same_seed_same_rows(self) -> None:
        again = self.build()
        for left, right in zip(self._loadable(), _ends(again), strict=True):
            assert equal(_rows(left.load()), _rows(right.load())), f"{left.domain!r} differs between two builds"

    def test_other_seed_other_rows(self) -> None:
        if self.seeded_by is None or "seed" not in inspect.signature(type(self).make).parameters:
            pytest.skip("the stream declares that no seed changes it")
        left, right = (_ends(self.build(**self.seeded_by, seed=seed)) for seed in (0, 1))
        same = [equal(_rows(a.load()), _rows(b.load())) for a, b in zip(left, right, strict=True)]
        assert not all(same), "two seeds give the same rows: give contract.seeded_by, or None"

    def test_draws_from_no_global_generator(self) -> None:
        before = torch.get_rng_state()
        stream = self.build()
        stream.experiences[0].load()
        assert torch.equal(before, torch.get_rng_state())

    def test_transform_is_a_pure_function_of_each_row(self) -> None:
        data = self.stream.eval_sets[0].load()
        raw = data.rows(torch.arange(4)).inputs
        kept = raw.clone()
        together = self.stream.transform(raw)
        assert torch.equal(raw, kept), "the transform changes the stored rows"
        assert torch.equal(together[1:2], self.stream.transform(raw[1:2])), "a row depends on the rows beside it"

    def test_augmentation_is_repeatable(self) -> None:
        if self.stream.augment is None:
            pytest.skip("the stream does not augment")
        rows = self.stream.experiences[0].load().rows(torch.arange(8))
        first, second = (self.stream.prepare(rows, Seeds(0).fresh("augment")) for _ in range(2))
        assert torch.equal(first.inputs, second.inputs), "draw from the generator that is given"
        assert first.inputs.shape == self.stream.prepare(rows).inputs.shape
        assert torch.equal(first.raw, rows.inputs), "raw rows are stored as they were, without augmentation"

    def test_survives_pickling(self) -> None:
        """Workers of `cl compare` and of data loaders receive streams this way."""
        copy = pickle.loads(pickle.dumps(self.stream))
        assert equal(_rows(copy.experiences[0].load()), _rows(self.stream.experiences[0].load()))
        assert copy.info == self.stream.info

    def _loadable(self) -> list[Experience | EvalSet]:
        return _ends(self.stream)


def _ends(stream: Stream) -> list[Experience | EvalSet]:
    """First and last experience, first and last eval set."""
    return [stream.experiences[0], stream.experiences[-1], stream.eval_sets[0], stream.eval_sets[-1]]


def _sample(num_rows: int) -> Tensor:
    """First rows, and those of every class where rows are sorted by it."""
    return torch.linspace(0, num_rows - 1, min(num_rows, SAMPLE)).long().unique()


def _rows(data: Data, every: bool = False) -> dict[str, Any]:
    rows = data.rows(torch.arange(len(data)) if every else _sample(len(data)))
    return {name: getattr(rows, name) for name in ("inputs", "targets", "experience_id", "sample_ids", "task_id")}
