"""DER against squared errors written out, from logits that the test remembers by itself."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from cl.core import Setting
from strategies.der import Der

ALPHA, SIZE = 0.7, 24
SETTINGS = [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL]


def check(lab, setting):
    """Loss terms and gradients of every step, at the weights it was taken from."""
    recorder, _ = lab.run([Der(capacity=40, replay_batch_size=SIZE, alpha=ALPHA)], setting)
    model, remembered = deepcopy(recorder.start), {}
    for step in recorder.steps:
        model.load_state_dict(step.before)
        current, *drawn = [step.batch[part.rows] for part in step.batch.parts]
        loss = lab.label_loss(model, current)
        lab.close(step.terms["cross_entropy"], loss.detach())
        if drawn:
            errors = [
                (z - remembered[row]) ** 2 for row, z in zip(lab.rows_of(drawn[0]), model(drawn[0]).logits, strict=True)
            ]
            penalty = ALPHA * torch.stack(errors).mean()
            lab.close(step.terms.get("der", 0.0), penalty.detach())
            loss = loss + penalty
        gradients = lab.gradient(model, loss)
        lab.close(step.gradients, {name: gradients[name] for name in step.gradients})
        # every row is seen once, so what it got then is what must be stored
        remembered |= dict(zip(lab.rows_of(current), model(current).logits.detach(), strict=True))
    assert [len(step.batch.parts) for step in recorder.steps[:3]] == [1, 2, 2]
    assert [len(step.batch) for step in recorder.steps[:3]] == [16, 32, 40]


@pytest.mark.parametrize("setting", SETTINGS)
def test_der_is_the_squared_error(lab, setting):
    check(lab, setting)


def test_the_oracle_needs_the_penalty(lab, monkeypatch):
    monkeypatch.setattr(Der, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab, SETTINGS[0]))
