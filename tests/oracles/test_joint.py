"""Joint training: exactly the rows of all experiences, each once per epoch."""

from __future__ import annotations

import pytest
import torch

from cl.core import Setting
from cl.testing import toy_stream
from strategies.cumulative import Cumulative
from strategies.joint import Joint
from strategies.naive import Naive


@pytest.mark.parametrize("setting", list(Setting))
@pytest.mark.parametrize("is_opaque", [False, True], ids=["tensors", "opaque"])
def test_it_holds_the_rows_of_every_experience(lab, setting, is_opaque):
    stream = toy_stream(setting)
    planned = Joint().plan(lab.opaque(stream) if is_opaque else stream)
    (whole,) = planned.experiences
    data, wanted = whole.load(), lab.plain_sum(stream, range(3))
    assert len(data) == whole.num_samples == len(wanted)
    for index in (
        torch.randperm(len(data), generator=torch.Generator().manual_seed(0)),
        torch.tensor([len(data) - 1, 0]),
    ):
        lab.same_rows(data.rows(index), wanted[index])
    assert set(whole.classes) == {c for e in stream.experiences for c in e.classes}


def test_it_is_one_experience_that_teaches_no_single_domain():
    stream = toy_stream(Setting.TASK_INCREMENTAL)
    planned = Joint().plan(stream)
    assert planned.info.num_experiences == 1
    assert planned.info.num_heads == 3
    assert planned.trained_domains == [-1]
    assert planned.eval_sets is stream.eval_sets


def test_every_row_is_trained_on_once_per_epoch(lab):
    recorder, _ = lab.run([Joint()], Setting.TASK_INCREMENTAL, epochs=2)
    rows = [row for step in recorder.steps for row in lab.rows_of(step.batch)]
    assert sorted(rows) == sorted([(k, i) for k in range(3) for i in range(192)] * 2)


def test_one_experience_is_left_as_it_is(lab):
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL, num_experiences=1)
    (joint, _), (naive, _) = lab.run([Joint()], stream), lab.run([], stream)
    lab.close(joint.steps[-1].after, naive.steps[-1].after, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("budget", "steps"), [({"max_steps": 7}, [7, 14, 21]), ({"max_tokens": 100}, [7, 13, 19])], ids=["steps", "tokens"]
)
def test_a_budget_counts_once_for_every_experience(lab, budget, steps):
    """Batches of 16: naive training takes 7 steps on each of three experiences, for either budget."""
    runs = {strategy.name: lab.run([strategy], epochs=None, **budget) for strategy in (Naive(), Joint(), Cumulative())}
    taken = {name: [step.experience for step in recorder.steps] for name, (recorder, _) in runs.items()}
    assert [taken["naive"].count(k) for k in range(3)] == [7, 7, 7]
    assert len(taken["joint"]) == steps[-1]
    assert [taken["cumulative"].count(k) for k in range(3)] == steps
    assert all(trainer.state.total_steps == trainer.state.step for _, trainer in runs.values())
