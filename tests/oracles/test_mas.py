"""MAS against sensitivities summed row by row."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from cl.core import IGNORED, Setting
from strategies.mas import Mas, squared_length

SETTINGS = [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL]


def plain_sensitivity(lab, trainer, model, k, group=1):
    """Mean over rows (or groups) of |gradient of the mean squared length of the outputs|."""
    data = trainer.state.stream.experiences[k].load()
    rows = trainer.state.prepare(data.rows(torch.arange(len(data))))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    pieces = torch.arange(len(rows)).split(group)
    for piece in pieces:
        length = (model(rows[piece]).logits ** 2).sum() / len(piece)
        for name, g in lab.gradient(model, length).items():
            total[name] += g.abs()
    return {name: value / len(pieces) for name, value in total.items()}


def check(lab, setting, convention="per_row"):
    mas = Mas(0.05, importance_rows=None, convention=convention, mix=0.3)
    recorder, trainer = lab.run([mas], setting)
    group = 1 if convention == "per_row" else lab.batch_size
    found = [plain_sensitivity(lab, trainer, recorder.ends[k], k, group) for k in range(3)]
    if convention == "per_row":
        known = [found[0], {n: found[0][n] + found[1][n] for n in found[0]}]
        last = {n: known[1][n] + found[2][n] for n in found[0]}
    else:
        known = [found[0], {n: 0.3 * found[0][n] + 0.7 * found[1][n] for n in found[0]}]
        last = {n: 0.3 * known[1][n] + 0.7 * found[2][n] for n in found[0]}
    lab.close(mas.importance, last, rtol=1e-5, atol=1e-9)
    model = deepcopy(recorder.start)
    for step in recorder.steps:
        if step.experience == 0:
            continue
        model.load_state_dict(step.before)
        importance, anchor = known[step.experience - 1], lab.weights(recorder.ends[step.experience - 1])
        penalty = 0.05 * sum((importance[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters())
        lab.close(step.terms.get("mas", 0.0), penalty.detach(), rtol=1e-5)
        wanted = lab.gradient(model, penalty + lab.label_loss(model, step.batch))
        lab.close(step.gradients, {n: wanted[n] for n in step.gradients}, rtol=1e-5)


@pytest.mark.parametrize("convention", ["per_row", "avalanche"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_mas_is_the_row_by_row_sum(lab, setting, convention):
    check(lab, setting, convention)


def test_labels_are_not_read(lab):
    _, trainer = lab.run([Mas()])
    state = trainer.state
    state.data = deepcopy(state.data)
    importances = []
    for _ in range(2):
        importances.append(Mas(importance_rows=None).measured(state, lambda z, _: z.square().sum(-1).mean(), torch.abs))
        state.data.targets.zero_()
    lab.close(*importances, rtol=0, atol=0)


def test_the_oracle_needs_the_penalty(lab, monkeypatch):
    monkeypatch.setattr(Mas, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab, SETTINGS[0]))


def test_what_is_not_asked_for_does_not_count():
    logits = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]]])
    targets = torch.tensor([[0, 1, IGNORED]])
    assert squared_length(logits, targets).item() == (5 + 9) / 2
    assert squared_length(logits, torch.full_like(targets, IGNORED)).item() == 0
    assert squared_length(logits[0], targets[0]).item() == pytest.approx((5 + 9 + 162) / 3), "images"
