"""SI against a loop that records gradient times movement, for several optimizers and every convention."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch

from cl.core import Setting
from strategies.si import Si

SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
XI = {"van_de_ven": 0.1, "zenke": 0.1, "avalanche": 1e-7}
STRENGTH = {"van_de_ven": 2.0, "zenke": 2.0, "avalanche": 20.0}


def check(lab, convention="van_de_ven", optimizer=SGD, setting=Setting.DOMAIN_INCREMENTAL):
    """Importance after every experience from recorded steps, then the penalty of every step from it."""
    recorder, trainer = lab.run([Si(STRENGTH[convention], convention=convention)], setting, optimizer=optimizer)
    anchor, model = lab.weights(recorder.start), deepcopy(recorder.start)
    importance = {name: torch.zeros_like(p) for name, p in anchor.items()}
    for k, end in enumerate(recorder.ends):
        path = {name: torch.zeros_like(p) for name, p in anchor.items()}
        for step in (step for step in recorder.steps if step.experience == k):
            if k > 0:
                moved = {name: p - anchor[name] for name, p in step.before.items()}
                used = {n: v.clamp(max=0.001) if convention == "avalanche" else v for n, v in importance.items()}
                factor = STRENGTH[convention] / (2 if convention == "avalanche" else 1)
                penalty = factor * sum((used[name] * moved[name] ** 2).sum() for name in moved)
                lab.close(step.terms.get("si", 0.0), penalty, rtol=1e-5)
                model.load_state_dict(step.before)
                plain = lab.gradient(model, lab.label_loss(model, step.batch))
                wanted = {name: plain[name] + 2 * factor * used[name] * moved[name] for name in step.gradients}
                lab.close(step.gradients, wanted, rtol=1e-5)
            for name, g in step.gradients.items():
                path[name] -= g * (step.after[name] - step.before[name])
        for name, p in lab.weights(end).items():
            importance[name] = importance[name] + path[name] / ((p - anchor[name]) ** 2 + XI[convention])
            if convention == "zenke":
                importance[name] = importance[name].clamp(min=0)
            anchor[name] = p
    lab.close(trainer.strategies[0].importance, importance, rtol=1e-6, atol=1e-9)
    return recorder, importance


@pytest.mark.parametrize("convention", XI)
@pytest.mark.parametrize("setting", [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL])
def test_si_is_the_recorded_path(lab, convention, setting):
    check(lab, convention, setting=setting)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_si_works_with_any_optimizer(lab, optimizer):
    _, importance = check(lab, optimizer=optimizer)
    assert lab.flat(importance).max() > 0.01


def test_plain_descent_pays_in_full(lab):
    """Under small plain steps the path integral adds up to the loss that was lost."""
    recorder, _ = lab.run(
        [Si(1e-9)], optimizer=partial(torch.optim.SGD, lr=1e-3), batch_size=192, max_steps=300, epochs=None
    )
    first = [step for step in recorder.steps if step.experience == 0]
    path = sum((g * (s.before[n] - s.after[n])).sum() for s in first for n, g in s.gradients.items())
    assert float(path) == pytest.approx(first[0].terms["loss"] - first[-1].terms["loss"], rel=0.02)
    moved = {n: p - lab.weights(recorder.start)[n] for n, p in lab.weights(recorder.ends[0]).items()}
    assert all(d.abs().max() > 0 for d in moved.values())


def test_the_oracle_needs_the_penalty(lab, monkeypatch):
    monkeypatch.setattr(Si, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_movement(lab, monkeypatch):
    monkeypatch.setattr(Si, "step", lambda self, state, batch, update: update())
    lab.dies(lambda: check(lab))
