"""PRD against its three terms written out row by row, with a teacher that is a copy of the recorded model."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from cl.core import Setting, UserError
from cl.testing import toy_stream
from strategies import prd
from strategies._contrastive import supervised_contrastive
from strategies.prd import Prd

CLASS, TASK = Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL
ARGUMENTS = {"prototype_weight": 1.5, "distill_weight": 3.0, "temperature": 0.2, "projection": 6}


def contrastive(vectors, labels, temperature):
    """One anchor at a time."""
    z = [v / v.norm() for v in vectors]
    terms = []
    for i, label in enumerate(labels):
        others = [a for a in range(len(z)) if a != i]
        total = sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
        positive = [a for a in others if labels[a] == label]
        if positive:
            terms.append(
                -sum(torch.log(torch.exp(z[i] @ z[p] / temperature) / total) for p in positive) / len(positive)
            )
    return sum(terms) / len(terms)


def similarities(hidden, prototypes):
    """(B, c): h . p / |p|."""
    return torch.stack([torch.stack([h @ p / p.norm() for p in prototypes]) for h in hidden])


def loss_of(model, teachers, rows, setting, experience):
    hidden = model.backbone(rows).hidden
    heads = [0] * len(rows) if rows.task_id is None else rows.task_id.tolist()
    labels = [(head, y) for head, y in zip(heads, rows.targets.tolist(), strict=True)]
    loss = contrastive(model.projector(hidden), labels, 0.2)
    prototypes = model.prototypes_HCF
    apart = [
        1 - h.detach() @ prototypes[k] / (h.norm().detach() * prototypes[k].norm())
        for h, k in zip(hidden, labels, strict=True)
    ]
    loss = loss + 1.5 * sum(apart) / len(apart)
    for k in range(experience):
        teacher = teachers[experience - 1]
        head, classes = (k, range(4)) if setting == TASK else (0, range(2 * k, 2 * k + 2))
        with torch.no_grad():
            old = similarities(teacher.backbone(rows).hidden, teacher.prototypes_HCF[head, list(classes)]).exp()
        new = similarities(hidden, prototypes[head, list(classes)]).exp()
        p, q = old / old.sum(1, keepdim=True), new / new.sum(1, keepdim=True)
        loss = loss + 3.0 * (p * (p / q).log()).sum() / len(rows)
    return loss


def check(lab, setting=CLASS, stream=None):
    recorder, _ = lab.run([Prd(**ARGUMENTS)], stream or setting)
    model, teachers = deepcopy(recorder.start), [end.eval() for end in recorder.ends]
    for step in recorder.steps[::5]:
        model.load_state_dict(step.before)
        loss = loss_of(model, teachers, step.batch, setting, step.experience)
        lab.close(step.terms["prd"], loss.detach(), rtol=1e-5)
        assert step.terms["cross_entropy"] == 0
        wanted = lab.gradient(model, loss)
        found = {name: step.gradients.get(name, torch.zeros_like(p)) for name, p in step.before.items()}
        lab.close(found, wanted, rtol=1e-5, atol=1e-6)
    assert recorder.steps[-1].experience == 2


@pytest.mark.parametrize("setting", [CLASS, TASK])
def test_prd_is_its_three_terms(lab, setting):
    check(lab, setting)


def flipped(inputs, generator):
    return inputs.flip(-1) if torch.rand((), generator=generator) < 0.5 else inputs + 0.1


def test_augmented_rows_come_in_two_views(lab):
    stream = replace(toy_stream(CLASS), augment=flipped)
    check(lab, CLASS, stream)
    recorder, trainer = lab.run([Prd(**ARGUMENTS)], stream)
    first, second = recorder.steps[-1].batch.parts
    assert (len(first), len(second), first.weight, second.weight) == (lab.batch_size, lab.batch_size, 0.0, 0.0)
    batch = recorder.steps[-1].batch
    assert lab.rows_of(batch[first.rows]) == lab.rows_of(batch[second.rows])
    assert any(not torch.equal(s.batch.inputs[:16], s.batch.inputs[16:]) for s in recorder.steps)
    cost = trainer.strategies[0].cost(trainer.state, 16)
    assert (cost.forwards, cost.backwards) == (48, 16)


@pytest.mark.parametrize("setting", [CLASS, TASK])
def test_the_oracle_needs_the_relations(lab, setting, monkeypatch):
    monkeypatch.setattr(Prd, "on_experience_end", lambda *_: None)
    lab.dies(lambda: check(lab, setting))


def test_the_oracle_needs_the_prototypes_loss(lab, monkeypatch):
    monkeypatch.setattr(Prd, "_apart", lambda self, net, rows, hidden: hidden.sum() * 0.0)
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_contrast(lab, monkeypatch):
    monkeypatch.setattr(prd, "supervised_contrastive", lambda vectors, *_: vectors.sum() * 0.0)
    lab.dies(lambda: check(lab))


def test_contrast_by_hand():
    """Three unit vectors at 0, 0 and 90 degrees, labels a, a, b: both a have log(e^(1/T) / (e^(1/T) + 1))."""
    vectors = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    wanted = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert supervised_contrastive(vectors, torch.tensor([0, 0, 1]), 0.5).item() == pytest.approx(wanted)
    assert supervised_contrastive(vectors, torch.tensor([0, 1, 2]), 0.5).item() == 0


def test_prediction_is_the_nearest_prototype_of_a_class_seen(lab):
    """Prototypes by hand: class 5 would win, but experience 2 has not been."""
    _, trainer = lab.run([strategy := Prd(**ARGUMENTS)], CLASS)
    model, state = trainer.state.model, trainer.state
    rows = state.prepare(state.stream.experiences[0].load().rows(torch.arange(6)))
    hidden = model(rows).hidden.detach()
    with torch.no_grad():
        model.prototypes_HCF.copy_(-hidden.mean(0).expand_as(model.prototypes_HCF))
        model.prototypes_HCF[0, 5] = 10 * hidden.mean(0)
        # less far from everything than its opposite, which the others are
        model.prototypes_HCF[0, 2] = -0.1 * hidden.mean(0)
        model.prototypes_HCF[0, 2, 0] += 0.1 * hidden.mean(0).norm()
    assert strategy.eval_forward(state, rows).logits.argmax(1).tolist() == [5] * 6
    state.classes_seen = (0, 1, 2, 3)
    logits = strategy.eval_forward(state, rows).logits
    assert logits.argmax(1).tolist() == [2] * 6
    prototype = model.prototypes_HCF[0, 2].detach()
    lab.close(logits[:, 2].detach(), torch.stack([h @ prototype / h.norm() / prototype.norm() for h in hidden]))


def test_prototypes_begin_at_about_length_one(lab):
    """Whatever the width: it sets how far a step of the optimizer turns them."""
    recorder, _ = lab.run([Prd(**ARGUMENTS)], CLASS, max_steps=1, epochs=None)
    lengths = recorder.start.prototypes_HCF.detach().norm(dim=-1)
    assert 0.6 < float(lengths.min()) < 1 < float(lengths.max()) < 1.5


def test_prototypes_have_neither_momentum_nor_decay(lab):
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    _, trainer = lab.run([Prd()], optimizer=sgd, setting=CLASS)
    others, prototypes = trainer.state.optimizer.param_groups
    assert (prototypes["momentum"], prototypes["weight_decay"], prototypes["lr"]) == (0.0, 0.0, 0.1)
    assert (others["momentum"], others["weight_decay"]) == (0.9, 0.1)
    assert len(others["params"]) + 1 == len(list(trainer.state.model.parameters()))


def test_the_same_classes_are_kept_once(lab):
    stream = toy_stream(CLASS)
    again = replace(stream, experiences=[*stream.experiences[:2], replace(stream.experiences[0], id=2)])
    _, trainer = lab.run([Prd()], again)
    assert trainer.strategies[0].groups == [[0, 0, 1], [0, 2, 3]]


def test_bad_input_is_refused(lab):
    for name, value in (("prototype_weight", 0), ("distill_weight", -1), ("temperature", 0), ("projection", 0)):
        with pytest.raises(UserError, match=rf"prd\.{name} is {value}"):
            Prd(**{name: value})
    stream = toy_stream(CLASS)
    with pytest.raises(UserError, match="prd distils similarities to the classes of old experiences"):
        Prd().check(replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences]))

    class Plain(nn.Module):
        def __init__(self, info):
            super().__init__()

    with pytest.raises(UserError, match=r"prd needs a backbone with features: a cl.backbones.Backbone, and Plain"):
        lab.run([Prd()], CLASS, backbone=Plain)
