"""Joint and cumulative training: exactly the rows they should train on, each once per epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl.core import Batch, Setting
from cl.testing import toy_stream
from strategies.cumulative import Cumulative
from strategies.joint import Joint

EVERY = [Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL, Setting.CONTINUAL_PRETRAINING]


class Opaque:
    """A data set that is not held in tensors."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def rows(self, index):
        return self.data.rows(index)


def opaque(stream):
    hidden = [replace(e, load=lambda load=e.load: Opaque(load())) for e in stream.experiences]
    return replace(stream, experiences=hidden)


def same_rows(found: Batch, wanted: Batch):
    for name in ("inputs", "targets", "experience_id", "sample_ids", "task_id"):
        left, right = getattr(found, name), getattr(wanted, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right), name


@pytest.mark.parametrize("setting", EVERY)
@pytest.mark.parametrize("form", [lambda stream: stream, opaque], ids=["tensors", "opaque"])
@pytest.mark.parametrize("strategy", [Joint, Cumulative])
def test_planned_rows_are_those_of_the_experiences(setting, form, strategy):
    stream = toy_stream(setting)
    planned = strategy().plan(form(stream))
    for k, experience in enumerate(planned.experiences):
        seen = stream.experiences if strategy is Joint else stream.experiences[: k + 1]
        wanted = Batch.cat([e.load().rows(torch.arange(e.num_samples)) for e in seen])
        data = experience.load()
        assert len(data) == experience.num_samples == len(wanted)
        shuffle = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        same_rows(data.rows(shuffle), wanted[shuffle])
        same_rows(data.rows(torch.tensor([len(data) - 1, 0])), wanted[torch.tensor([len(data) - 1, 0])])
        assert set(experience.classes) == {c for e in seen for c in e.classes}
    assert planned.eval_sets is stream.eval_sets


def test_joint_is_one_experience_and_cumulative_as_many():
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL)
    assert len(Joint().plan(stream).experiences) == Joint().plan(stream).info.num_experiences == 1
    assert Joint().plan(stream).trained_domains == [-1]
    assert Cumulative().plan(stream).trained_domains == [0, 1, 2]


@pytest.mark.parametrize("strategy", [Joint, Cumulative])
def test_every_row_is_trained_on_once_per_epoch(lab, strategy):
    recorder, _ = lab.run([strategy()], Setting.TASK_INCREMENTAL, epochs=2)
    experiences = [0] if strategy is Joint else [0, 1, 2]
    for k in experiences:
        rows = [row for step in recorder.steps if step.experience == k for row in lab.rows_of(step.batch)]
        past = range(3) if strategy is Joint else range(k + 1)
        assert sorted(rows) == sorted([(e, i) for e in past for i in range(192)] * 2)


@pytest.mark.parametrize("strategy", [Joint, Cumulative])
def test_a_stream_of_one_experience_is_left_as_it_is(lab, strategy):
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL, num_experiences=1)
    planned, _ = lab.run([strategy()], stream)
    naive, _ = lab.run([], stream)
    assert all(torch.equal(p, naive.steps[-1].after[name]) for name, p in planned.steps[-1].after.items())
