"""Center loss against a plain loop that keeps its centres in a dictionary, and against numbers by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.core import Batch, Output, Setting, UserError
from strategies.center_loss import CenterLoss
from strategies.replay import Replay

STRENGTH, RATE = 0.3, 0.4


def check(lab, head_rate=0.25, others=()):
    recorder, trainer = lab.run([*others, CenterLoss(STRENGTH, RATE, head_rate)])
    model, centers, num_checked = deepcopy(recorder.start), {}, 0
    for step in recorder.steps:
        # the recorder sits inside of the step that holds the head, so what it notes after one is not the last word
        lab.close(step.before, lab.weights(model))
        loss = F.cross_entropy(model(step.batch.current()).logits, step.batch.current().targets)
        for part in step.batch.parts[1:]:
            rows = step.batch[part.rows]
            loss = loss + F.cross_entropy(model(rows).logits, rows.targets)
        hidden, labels = model(step.batch).hidden, step.batch.targets.tolist()
        pulls = [(h - centers[y]).square().sum() for h, y in zip(hidden, labels, strict=True) if y in centers]
        if pulls:
            pull = STRENGTH / 2 * sum(pulls) / len(pulls)
            lab.close(step.terms.get("center_loss", 0.0), pull.detach())
            loss, num_checked = loss + pull, num_checked + 1
        gradients = lab.gradient(model, loss)
        if step.experience == 0:
            for label in set(labels):
                rows = [h.detach() for h, y in zip(hidden, labels, strict=True) if y == label]
                if label not in centers:
                    centers[label] = sum(rows) / len(rows)
                else:
                    apart = sum(centers[label] - row for row in rows)
                    centers[label] = centers[label] - RATE * apart / (1 + len(rows))
        with torch.no_grad():
            for name, p in model.named_parameters():
                rate = head_rate if step.experience > 0 and name.startswith("head.") else 1.0
                p -= rate * lab.lr * gradients[name]
    lab.close(lab.weights(trainer.state.model), lab.weights(model))
    assert num_checked == len(recorder.steps) - 1
    found = trainer.strategies[len(others)].kept["centers"]
    lab.close(found, torch.stack([centers[label] for label in range(4)]))


@pytest.mark.parametrize("head_rate", [0.0, 0.25, 1.0])
def test_center_loss_is_the_plain_loop(lab, head_rate):
    check(lab, head_rate)


def test_stored_rows_are_pulled_too(lab):
    check(lab, others=[Replay(capacity=30, replay_batch_size=8, update="experience_end")])


def test_the_oracle_needs_the_pull(lab, monkeypatch):
    monkeypatch.setattr(CenterLoss, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_kept_head(lab, monkeypatch):
    monkeypatch.setattr(CenterLoss, "step", lambda self, state, batch, update: update())
    lab.dies(lambda: check(lab))


def test_a_frozen_head_does_not_move_under_momentum_and_decay(lab):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    recorder, _ = lab.run([CenterLoss()], optimizer=sgd)
    later = [step.before for step in recorder.steps if step.experience > 0]
    assert all(torch.equal(before[n], later[0][n]) for before in later for n in ("head.weight", "head.bias"))
    assert not torch.equal(later[-1]["first.weight"], later[0]["first.weight"])
    assert not torch.equal(later[0]["head.weight"], recorder.steps[0].before["head.weight"])


def test_the_rule_of_the_centres_by_hand(lab):
    """Start at the mean (2, 0); then 2 - 0.5 * ((2 - 5) + (2 - 3)) / 3 = 2 + 2/3."""
    _, trainer = lab.run([strategy := CenterLoss(1.0, 0.5)], epochs=None, max_steps=1)
    strategy.kept = {}
    trainer.state.experience = trainer.state.stream.experiences[1]

    def see(*features):
        rows = torch.zeros(len(features), dtype=torch.int64)
        batch = Batch(torch.zeros(len(features), 1), rows, rows, rows)
        hidden = torch.tensor([[float(value), 0.0] for value in features])
        strategy.on_step_end(trainer.state, batch, Output(hidden, hidden))

    see(1, 3)
    assert strategy.kept["centers"][0].tolist() == [2.0, 0.0]
    see(5, 3)
    assert strategy.kept["centers"][0].tolist() == pytest.approx([2 + 2 / 3, 0.0])
    trainer.state.experience = trainer.state.stream.experiences[2]
    see(100)
    assert strategy.kept["centers"][0].tolist() == pytest.approx([2 + 2 / 3, 0.0])
    assert strategy.kept["learnt_in"].tolist() == [1, -1, -1, -1]


def test_bad_arguments_are_refused(lab):
    for name, value in (("strength", -1.0), ("center_rate", 1.5), ("head_rate", 2)):
        with pytest.raises(UserError, match=rf"center_loss\.{name} is {value}"):
            CenterLoss(**{name: value})

    class Plain(nn.Module):
        def __init__(self, info):
            super().__init__()

    with pytest.raises(UserError, match="center_loss needs a backbone with a head over its features"):
        lab.run([CenterLoss()], Setting.DOMAIN_INCREMENTAL, backbone=Plain)
