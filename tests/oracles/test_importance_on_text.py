"""EWC, MAS, SI and LwF on text: rows of tokens in place of rows with a class."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.config import TrainerConfig
from cl.core import IGNORED, Setting, UserError
from cl.testing import toy_stream
from cl.trainer import Trainer
from strategies.ewc import Ewc
from strategies.lwf import Lwf
from strategies.mas import Mas
from strategies.si import Si
from streams.builtin_text import builtin_text

TEXT = Setting.CONTINUAL_PRETRAINING
STRENGTH, TEMPERATURE = 3.0, 2.0


def per_row(lab, model, loss, function):
    """Mean over the rows of the last experience of a function of each row's gradient, one backward pass each."""
    rows = toy_stream(TEXT).experiences[-1].load().rows(torch.arange(192))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(len(rows)):
        one = rows[row : row + 1]
        for name, g in lab.gradient(model, loss(model(one).logits[0], one.targets[0])).items():
            total[name] += function(g)
    return {name: value / len(rows) for name, value in total.items()}


def test_fisher_is_that_of_the_mean_over_the_tokens_of_a_row(lab):
    recorder, trainer = lab.run([Ewc(mode="online", gamma=0.0, importance_rows=None)], TEXT)
    wanted = per_row(lab, recorder.ends[-1], F.cross_entropy, torch.square)
    lab.close(trainer.strategies[0].importance, wanted, rtol=1e-5, atol=1e-12)
    assert lab.flat(wanted).max() > 1e-5


def test_sensitivity_is_that_of_the_mean_over_the_tokens_of_a_row(lab):
    recorder, trainer = lab.run([Mas(strength=1e-6, importance_rows=None)], TEXT)
    mas = trainer.strategies[0]
    last = per_row(lab, recorder.ends[-1], lambda z, y: z.square().sum(-1).mean(), torch.abs)
    before = {name: mas.importance[name] - value for name, value in last.items()}
    # the sum over experiences, of which the last one is known here
    assert all((value > -1e-9).all() for value in before.values())
    assert lab.flat(last).max() > 1e-3


def test_sampled_tokens_are_the_models_own(lab):
    """Labels drawn from the model give another Fisher than those of the data."""
    found = {
        labels: lab.run([Ewc(labels=labels, mode="online", gamma=0.0, importance_rows=None)], TEXT)[1]
        for labels in ("true", "sampled")
    }
    true, sampled = (lab.flat(trainer.strategies[0].importance) for trainer in found.values())
    assert sampled.shape == true.shape and not torch.allclose(sampled, true, rtol=1e-2)
    assert 0.2 < float(sampled.sum() / true.sum()) < 5


def ewc_check(lab):
    recorder, _ = lab.run([Ewc(strength=STRENGTH, mode="online", importance_rows=None)], TEXT)
    number = next(n for n, step in enumerate(recorder.steps) if step.experience == 1) + 5
    step, anchor = recorder.steps[number], dict(recorder.ends[0].named_parameters())
    model = recorder.ends[0]
    rows = toy_stream(TEXT).experiences[0].load().rows(torch.arange(192))
    fisher = {name: torch.zeros_like(p) for name, p in anchor.items()}
    for row in range(192):
        one = rows[row : row + 1]
        loss = F.cross_entropy(model(one).logits[0], one.targets[0])
        for name, g in lab.gradient(model, loss).items():
            fisher[name] += g * g / 192
    penalty = STRENGTH / 2 * sum((fisher[n] * (step.before[n] - anchor[n]).square()).sum() for n in anchor)
    lab.close(step.terms.get("ewc", 0.0), penalty.detach(), rtol=1e-5, atol=1e-9)


def test_penalty_is_the_parabola(lab):
    ewc_check(lab)


def test_the_oracle_needs_the_penalty(lab, monkeypatch):
    monkeypatch.setattr(Ewc, "penalty", lambda *_: None)
    lab.dies(lambda: ewc_check(lab))


def lwf_check(lab, ignored=False):
    stream = toy_stream(TEXT)
    if ignored:
        for experience in stream.experiences:
            data = experience.load()
            data.targets[:, :3] = IGNORED
            object.__setattr__(experience, "load", lambda data=data: data)
    recorder, _ = lab.run([Lwf(STRENGTH, TEMPERATURE)], stream)
    model, checked = deepcopy(recorder.start), 0
    for step in [s for s in recorder.steps if s.experience][::4]:
        model.load_state_dict(step.before)
        teacher, rows = recorder.ends[step.experience - 1], step.batch
        total, count = 0.0, 0
        for row in range(len(rows)):
            for place in range(3 if ignored else 0, 8):
                old, new = (m(rows).logits[row, place] / TEMPERATURE for m in (teacher, model))
                p, q = old.softmax(0).detach(), new.softmax(0)
                total, count = total + (p * (p / q).log()).sum(), count + 1
        penalty = STRENGTH * total / count
        lab.close(step.terms.get("lwf", 0.0), penalty.detach(), rtol=1e-4, atol=1e-6)
        learnt = rows.targets != IGNORED
        loss = penalty + F.cross_entropy(model(rows).logits[learnt], rows.targets[learnt])
        lab.close(step.gradients, lab.gradient(model, loss), rtol=1e-4, atol=1e-6)
        checked += float(penalty.detach()) > 1e-3
    assert checked >= 3


@pytest.mark.parametrize("ignored", [False, True])
def test_distillation_is_over_the_tokens_to_be_learnt(lab, ignored):
    lwf_check(lab, ignored)


@pytest.mark.parametrize("strategy", [Ewc(importance_rows=None), Lwf()], ids=lambda s: s.name)
def test_rows_with_nothing_to_learn_are_no_division_by_zero(lab, strategy):
    stream = toy_stream(TEXT)
    for experience in stream.experiences:
        data = experience.load()
        data.targets[::3] = IGNORED
        object.__setattr__(experience, "load", lambda data=data: data)
    recorder, _ = lab.run([strategy], stream, batch_size=1, max_steps=12, epochs=None)
    empty = [step for step in recorder.steps if (step.batch.targets == IGNORED).all()]
    assert empty and all(step.terms["cross_entropy"] == 0.0 for step in empty)
    assert all(p.isfinite().all() for p in recorder.ends[-1].parameters())


def test_the_oracle_needs_the_distillation(lab, monkeypatch):
    monkeypatch.setattr(Lwf, "penalty", lambda *_: None)
    lab.dies(lambda: lwf_check(lab))


def test_every_class_in_turn_is_refused_on_text(lab):
    with pytest.raises(UserError, match=r"ewc\.labels is 'all'; it must be true or sampled on text"):
        lab.run([Ewc(labels="all")], TEXT)


EVERY = [Ewc(importance_rows=20), Mas(importance_rows=20), Si(), Lwf()]


@pytest.mark.parametrize("strategy", EVERY, ids=lambda s: s.name)
def test_a_decoder_is_held(strategy):
    """On attention and packed documents: nearer to where it was than naive training gets."""

    def end(strategies):
        trainer = Trainer(
            builtin_text(context=16, train_tokens=1600, eval_tokens=320).first(2),
            partial(Gpt, width=16, num_layers=1, num_heads=2),
            strategies,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            config=TrainerConfig(batch_size=10, device="cpu"),
        )
        return trainer.run()

    held, free = end([strategy]), end([])
    assert held.R[0] == free.R[0] and held.R[1] != free.R[1]
