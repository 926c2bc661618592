"""Cumulative training: experience k holds exactly the rows of experiences 0 to k."""

from __future__ import annotations

import pytest
import torch

from cl.core import Setting
from cl.metrics import EvalTable, revisit_curve
from cl.testing import toy_stream
from strategies.cumulative import Cumulative
from streams.permuted import permuted
from streams.power_law import power_law
from streams.scole import scole


@pytest.mark.parametrize("setting", list(Setting))
@pytest.mark.parametrize("is_opaque", [False, True], ids=["tensors", "opaque"])
def test_it_holds_the_rows_so_far(lab, setting, is_opaque):
    stream = toy_stream(setting)
    planned = Cumulative().plan(lab.opaque(stream) if is_opaque else stream)
    assert planned.info == stream.info
    for k, experience in enumerate(planned.experiences):
        data, wanted = experience.load(), lab.plain_sum(stream, range(k + 1))
        assert len(data) == experience.num_samples == len(wanted)
        for index in (
            torch.randperm(len(data), generator=torch.Generator().manual_seed(0)),
            torch.tensor([len(data) - 1, 0]),
        ):
            lab.same_rows(data.rows(index), wanted[index])
        assert set(experience.classes) == {c for e in stream.experiences[: k + 1] for c in e.classes}
    assert planned.trained_domains == [0, 1, 2]
    assert planned.practised_domains == [], "no domain comes back in this stream"


@pytest.mark.parametrize(
    ("make", "practised"),
    [
        (lambda: scole("digits", 3, kind="cycle"), [[0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        (lambda: power_law(permuted("digits", 3, train_rows=60), "uniform"), [[0], [0, 1], [0, 1, 2]]),
    ],
    ids=["scole", "power_law"],
)
def test_nothing_seen_is_ever_out_of_practice(lab, make, practised):
    """So every cell of R has lag 0 in a retention curve."""
    _, trainer = lab.run([Cumulative()], make(), max_steps=1, epochs=None)
    assert trainer.ledger.result.practises == practised
    curve = revisit_curve(EvalTable.from_result(vars(trainer.ledger.result)))
    assert (curve.lag.tolist(), curve.num_pairs.tolist()) == ([0], [sum(map(len, practised))])


def test_every_row_is_trained_on_once_per_epoch(lab):
    recorder, _ = lab.run([Cumulative()], Setting.TASK_INCREMENTAL, epochs=2)
    for k in range(3):
        rows = [row for step in recorder.steps if step.experience == k for row in lab.rows_of(step.batch)]
        assert sorted(rows) == sorted([(e, i) for e in range(k + 1) for i in range(192)] * 2)


def test_the_first_experience_is_naive(lab):
    (grown, _), (naive, _) = lab.run([Cumulative()]), lab.run([])
    lab.close(grown.steps[11].after, naive.steps[11].after, rtol=0, atol=0)
    assert grown.steps[12].batch.experience_id.unique().tolist() == [0, 1]
