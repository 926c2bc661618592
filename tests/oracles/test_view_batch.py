"""The one-to-many loss against a loop over rows, and the published grouping against a walk of its code."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cl.core import Batch, Output, Setting, Source, UserError
from cl.testing import toy_stream
from strategies.view_batch import ViewBatch, neighbours

C = 5

# the published code divides by the classes as well, which torch warns of
pytestmark = pytest.mark.filterwarnings("ignore:reduction")


def batch_of(ids, targets=None):
    targets = torch.zeros(len(ids), dtype=torch.int64) if targets is None else torch.tensor(targets)
    return Batch(torch.zeros(len(ids), 1), targets, torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids))


def logits_for(count, seed=0):
    draw = torch.randn(count, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.requires_grad_()


def penalty(strategy, batch, logits, epoch=10):
    return strategy.penalty(SimpleNamespace(epoch=epoch), batch, Output(logits))


def by_rows(logits, groups):
    """Mean over later rows of KL(first || later) / C, the first one fixed."""
    p, terms = logits.softmax(-1), []
    for first, *later in groups:
        terms += [F.kl_div(p[row].unsqueeze(0).log(), p[first].detach().unsqueeze(0)) for row in later]
    return torch.stack(terms).mean()


def check(strategy, ids, groups, targets=None):
    logits = logits_for(len(ids))
    found = penalty(strategy, batch_of(ids, targets), logits)
    wanted = strategy.strength * by_rows(logits, groups)
    assert torch.allclose(found, wanted, rtol=1e-12)
    ours, plain = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (found, wanted))
    assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-15)


def test_views_are_tied_by_sample_id():
    check(ViewBatch(strength=0.7), [3, 3, 3, 9, 9, 9, 1], [[0, 1, 2], [3, 4, 5], [6]])
    # neither neighbourhood nor label matters
    check(ViewBatch(), [3, 9, 3, 9], [[0, 2], [1, 3]], targets=[1, 1, 1, 1])


def test_labels_tie_neighbours_as_published():
    """Two images of class 2 stand side by side: the published code makes one group of them, and lets V rows join."""
    ids, targets = [0, 0, 1, 1, 2, 2], [2, 2, 2, 2, 0, 0]
    check(ViewBatch(group_by="label", views=2), ids, [[0, 1, 2], [3], [4, 5]], targets)
    check(ViewBatch(group_by="label", views=4), ids, [[0, 1, 2, 3], [4, 5]], targets)


def walk(labels, views):
    """The published loop: who is tied to whom."""
    first, previous, level, groups = -1, None, 0, []
    for row, label in enumerate(labels):
        if previous == label and level < views:
            level += 1
        else:
            level, previous, first = 0, label, row
        groups.append(first)
    return groups


def test_neighbours_are_those_of_the_published_loop():
    generator = torch.Generator().manual_seed(0)
    for views in (1, 2, 3, 4):
        for _ in range(50):
            labels = torch.randint(2, (24,), generator=generator)
            assert neighbours(labels, views).tolist() == walk(labels.tolist(), views)


def test_replayed_rows_take_no_part():
    batch, logits = batch_of([4, 4]), logits_for(4)
    mixed = batch.extended(batch_of([4, 4]), Source.REPLAY, "replay")
    found = penalty(ViewBatch(), mixed, logits)
    assert torch.equal(found, penalty(ViewBatch(), batch, logits[:2]))
    assert torch.autograd.grad(found, logits)[0][2:].abs().sum() == 0


def test_the_first_view_is_a_fixed_target():
    logits = logits_for(3)
    gradient = torch.autograd.grad(penalty(ViewBatch(), batch_of([1, 1, 1]), logits), logits)[0]
    assert gradient[0].abs().sum() == 0
    assert gradient[1:].abs().sum() > 0


def test_when_there_is_nothing_to_tie():
    logits = logits_for(3)
    assert penalty(ViewBatch(), batch_of([1, 2, 3]), logits) is None
    assert penalty(ViewBatch(strength=0), batch_of([1, 1, 1]), logits) is None
    assert penalty(ViewBatch(), batch_of([1, 1, 1]), logits, epoch=5) is None
    assert penalty(ViewBatch(), batch_of([1, 1, 1]), logits, epoch=6) is not None


def test_the_oracle_needs_the_groups(lab, monkeypatch):
    monkeypatch.setattr("strategies.view_batch.first_views", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    lab.dies(lambda: check(ViewBatch(), [3, 3, 3, 9, 9], [[0, 1, 2], [3, 4]]))


def test_views_in_a_run(lab):
    """Through the trainer: the term is that of the recorded batch, from the warm-up's end on."""
    toy = toy_stream(Setting.CLASS_INCREMENTAL)

    def twice(num_rows, epoch, generator):
        return torch.randperm(num_rows, generator=generator)[: num_rows // 2].repeat_interleave(2)

    shown = replace(toy, experiences=[replace(e, order=twice) for e in toy.experiences])
    recorder, _ = lab.run([ViewBatch(strength=2.0, warmup_epochs=1)], shown, epochs=2)
    late = [step for step in recorder.steps if "view_batch" in step.terms]
    assert len(late) == len(recorder.steps) // 2
    # the same inputs twice say the same, so nothing is to be distilled
    assert all(abs(step.terms["view_batch"]) < 1e-12 for step in late)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"strength": -1}, "view_batch.strength is -1; it must be a finite number of at least 0"),
        ({"group_by": "image"}, "view_batch.group_by is 'image'; it must be one of sample, label"),
        ({"views": 0}, "view_batch.views is 0; it must be an integer of at least 1"),
        ({"warmup_epochs": -2}, "view_batch.warmup_epochs is -2; it must be a finite number of at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ViewBatch(**arguments)
