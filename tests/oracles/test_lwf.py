"""LwF against the divergence written out, with a teacher that is a deep copy of the recorded model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.core import Setting, UserError
from cl.testing import ToyNet, toy_stream
from strategies.lwf import Lwf
from strategies.replay import Replay

STRENGTH, TEMPERATURE = 0.8, 2.0
SETTINGS = [Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL]


def divergence(teacher, model, rows, setting, experience, temperature):
    """sum p log(p / q) over old outputs, mean over rows, summed over old heads."""
    if setting == Setting.TASK_INCREMENTAL:
        cases = [
            (replace(rows, task_id=torch.full_like(rows.task_id, k), parts=()), range(4)) for k in range(experience)
        ]
    else:
        cases = [(rows, range(2 * experience if setting == Setting.CLASS_INCREMENTAL else 4))]
    total = 0.0
    for case, outputs in cases:
        old, new = teacher(case).logits[:, list(outputs)].detach(), model(case).logits[:, list(outputs)]
        p, q = ((logits / temperature).exp() for logits in (old, new))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        total = total + (p * (p / q).log()).sum() / len(rows)
    return total


def check(lab, setting, convention="plain", others=(), backbone=ToyNet):
    recorder, _ = lab.run([*others, Lwf(STRENGTH, TEMPERATURE, convention)], setting, backbone=backbone)
    factor = STRENGTH * (TEMPERATURE**2 if convention == "hinton" else 1.0)
    model, num_checked = deepcopy(recorder.start), 0
    for step in recorder.steps:
        if step.experience == 0:
            assert "lwf" not in step.terms
            continue
        model.load_state_dict(recorder.ends[step.experience - 1].state_dict() | step.before)
        teacher = recorder.ends[step.experience - 1].eval()
        current = step.batch.current()
        penalty = factor * divergence(teacher, model.train(), current, setting, step.experience, TEMPERATURE)
        lab.close(step.terms.get("lwf", 0.0), penalty.detach(), rtol=1e-4, atol=1e-6)
        if not others:
            wanted = lab.gradient(model, penalty + lab.label_loss(model, current))
            found = {name: step.gradients.get(name, torch.zeros_like(p)) for name, p in step.before.items()}
            lab.close(found, wanted, rtol=1e-4, atol=1e-6)
        num_checked += float(penalty.detach()) > 1e-4
    assert num_checked > 5


@pytest.mark.parametrize("convention", ["plain", "hinton"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_lwf_is_the_divergence(lab, setting, convention):
    check(lab, setting, convention)


@pytest.mark.parametrize("setting", SETTINGS)
def test_only_current_rows_are_distilled(lab, setting):
    check(lab, setting, others=[Replay()])


def test_teacher_is_in_evaluation_mode(lab):
    class Noisy(ToyNet):
        def __init__(self, info):
            super().__init__(info)
            self.norm = nn.BatchNorm1d(12)

        def features(self, inputs):
            return self.norm(super().features(inputs))

    recorder, trainer = lab.run([Lwf()], Setting.CLASS_INCREMENTAL, backbone=Noisy)
    teacher = trainer.strategies[0].teacher
    assert torch.equal(teacher["norm.running_mean"], recorder.ends[-1].norm.running_mean)
    assert all(module.training for module in trainer.state.model.modules())
    # the first step after the second experience: the student's running statistics moved, the teacher's did not
    assert recorder.steps[-1].terms["lwf"] > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_oracle_needs_the_penalty(lab, setting, monkeypatch):
    monkeypatch.setattr(Lwf, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab, setting))


def test_an_experience_without_new_classes_still_has_old_ones(lab):
    stream = toy_stream(Setting.CLASS_INCREMENTAL)
    again = replace(stream, experiences=[*stream.experiences[:2], replace(stream.experiences[0], id=2)])
    _, trainer = lab.run([Lwf()], again)
    assert trainer.strategies[0].old_outputs == {0: [0, 1, 2, 3]}


def test_streams_that_name_no_classes_are_refused():
    stream = toy_stream(Setting.CLASS_INCREMENTAL)
    nameless = replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences])
    with pytest.raises(UserError, match="lwf distils the outputs of old classes, and experience 0"):
        Lwf().check(nameless)
    Lwf().check(stream)
    # the classes of the last experience never become old
    Lwf().check(replace(nameless, experiences=nameless.experiences[:1]))


def test_backbones_without_heads_are_refused(lab):
    class OneHead(ToyNet):
        def __init__(self, info):
            super().__init__(replace(info, num_heads=1))

    with pytest.raises(UserError, match=r"lwf in the task_incremental setting needs a backbone with a .*MultiHead"):
        lab.run([Lwf()], Setting.TASK_INCREMENTAL, backbone=OneHead)


def test_temperature_flattens():
    logits = torch.tensor([[4.0, 0.0]])
    kl = [float(Lwf(temperature=t)._divergence(-logits, logits)) for t in (1.0, 2.0, 8.0)]
    assert kl[0] > kl[1] > kl[2] > 0
    assert float(Lwf(temperature=2.0, convention="hinton")._divergence(-logits, logits)) == pytest.approx(4 * kl[1])
    assert kl[0] == pytest.approx(float(F.kl_div((-logits).log_softmax(1), logits.softmax(1), reduction="sum")))
