"""EWC against Fisher information summed row by row, and penalties summed experience by experience."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import strategies._importance
from cl.backbones.recurrent import Recurrent
from cl.core import Setting
from cl.testing import ToyNet
from strategies.ewc import Ewc

SETTINGS = [Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL]


class Looped(ToyNet):
    """Taken row by row, because `vmap` has no rules for such a layer."""

    def __init__(self, info):
        super().__init__(info)
        self.unused = torch.nn.RNN(1, 1)


def plain_fisher(lab, model, rows, labels="true", group=1):
    """Mean over rows (or groups of rows) of the squared gradient, by one backward pass each."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    pieces = torch.arange(len(rows)).split(group)
    for piece in pieces:
        logits = model(rows[piece]).logits
        if labels == "true":
            cases = [(1.0, rows.targets[piece])]
        else:
            cases = [(float(p), torch.tensor([c])) for c, p in enumerate(logits.detach().softmax(-1)[0])]
        for probability, targets in cases:
            found = lab.gradient(model, F.cross_entropy(model(rows[piece]).logits, targets))
            for name, g in found.items():
                total[name] += probability * g * g
    return {name: value / len(pieces) for name, value in total.items()}


def all_rows(trainer, k):
    data = trainer.state.stream.experiences[k].load()
    return trainer.state.prepare(data.rows(torch.arange(len(data))))


def apart(model, anchor):
    return {name: p - dict(anchor.named_parameters())[name].detach() for name, p in model.named_parameters()}


def total(fisher, difference):
    return sum((fisher[name] * d.square()).sum() for name, d in difference.items())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("labels", ["true", "all"])
def test_fisher_is_the_row_by_row_one(lab, setting, labels):
    recorder, trainer = lab.run([Ewc(labels=labels, mode="online", gamma=0.0, importance_rows=None)], setting)
    wanted = plain_fisher(lab, recorder.ends[-1], all_rows(trainer, 2), labels)
    lab.close(trainer.strategies[0].importance, wanted, rtol=1e-5, atol=1e-12)
    assert lab.flat(wanted).max() > 1e-4


@pytest.mark.parametrize("labels", ["true", "all"])
@pytest.mark.parametrize("backbone", [ToyNet, Looped])
def test_fisher_is_that_of_the_masked_likelihood(lab, labels, backbone):
    """Under `trainer.logit_mask=batch` probabilities are shared out among the classes that the experience has."""
    strategy = Ewc(labels=labels, mode="online", gamma=0.0, importance_rows=None)
    recorder, trainer = lab.run([strategy], Setting.CLASS_INCREMENTAL, backbone, logit_mask="batch")
    rows, model = all_rows(trainer, 1 + 1), recorder.ends[-1]
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(rows)):
        logits = model(rows[[k]]).logits[:, 4:]
        asked = (0, 1) if labels == "all" else (int(rows.targets[k]) - 4,)
        for label in asked:
            share = logits.softmax(1)[0, label].item() if labels == "all" else 1.0
            loss = F.cross_entropy(model(rows[[k]]).logits[:, 4:], torch.tensor([label]))
            for name, g in lab.gradient(model, loss).items():
                wanted[name] += share * g.square() / len(rows)
    lab.close(strategy.importance, wanted, rtol=1e-5, atol=1e-12)
    assert not strategy.importance["head.weight"][:4].any() and wanted["head.weight"][4:].all()


def test_sampled_labels_are_right_on_average(lab):
    recorder, trainer = lab.run([Ewc()], max_steps=3, epochs=None)
    state, ewc = trainer.state, Ewc(labels="sampled", importance_rows=None)
    draws = [ewc.measured(state, F.cross_entropy, torch.square, "sampled") for _ in range(30)]
    mean = lab.flat({name: torch.stack([draw[name] for draw in draws]).mean(0) for name in draws[0]})
    wanted = lab.flat(plain_fisher(lab, recorder.ends[-1], all_rows(trainer, 2), "all"))
    assert (mean - wanted).norm() < 0.03 * wanted.norm()
    assert not torch.equal(draws[0]["first.weight"], draws[1]["first.weight"])


def test_rows_are_drawn_and_the_mean_is_over_them(lab):
    _, trainer = lab.run([Ewc()])
    state, ewc = trainer.state, Ewc(importance_rows=20)
    few = [lab.flat(ewc.measured(state, F.cross_entropy, torch.square)) for _ in range(60)]
    whole = lab.flat(Ewc(importance_rows=None).measured(state, F.cross_entropy, torch.square))
    assert (torch.stack(few).mean(0) - whole).norm() < 0.15 * whole.norm()


def check_penalty(lab, mode, gamma=1.0, setting=Setting.DOMAIN_INCREMENTAL):
    """Penalty and its gradient at every step of the third experience, from two solutions and two Fishers."""
    recorder, trainer = lab.run([Ewc(50.0, mode, gamma, importance_rows=None)], setting)
    fishers = [plain_fisher(lab, recorder.ends[k], all_rows(trainer, k)) for k in (0, 1)]
    model = deepcopy(recorder.start)
    num_checked = 0
    for step in recorder.steps:
        model.load_state_dict(step.before)
        if step.experience < 2:
            assert ("ewc" in step.terms) == (step.experience == 1)
            continue
        if mode == "offline":
            penalty = 25.0 * sum(total(fishers[k], apart(model, recorder.ends[k])) for k in (0, 1))
        else:
            running = {name: gamma * fishers[0][name] + f for name, f in fishers[1].items()}
            penalty = 25.0 * total(running, apart(model, recorder.ends[1]))
        lab.close(step.terms["ewc"], penalty.detach(), rtol=1e-5)
        wanted = lab.gradient(model, penalty + lab.label_loss(model, step.batch))
        lab.close(step.gradients, {name: wanted[name] for name in step.gradients}, rtol=1e-5)
        num_checked += 1
    assert num_checked == 12


@pytest.mark.parametrize(("mode", "gamma"), [("offline", 1.0), ("online", 1.0), ("online", 0.5)])
def test_penalty_is_the_sum_over_experiences(lab, mode, gamma):
    check_penalty(lab, mode, gamma)


def test_penalty_with_a_head_per_task(lab):
    check_penalty(lab, "offline", setting=Setting.TASK_INCREMENTAL)


def test_the_oracle_needs_the_penalty(lab, monkeypatch):
    monkeypatch.setattr(Ewc, "penalty", lambda *_: None)
    lab.dies(lambda: check_penalty(lab, "online"))


def test_the_oracle_needs_every_experience(lab, monkeypatch):
    monkeypatch.setattr(Ewc, "_add_parabola", lambda self, f, s: self.__dict__.update(importance=f, anchor=s))
    lab.dies(lambda: check_penalty(lab, "offline"))


def test_avalanche_convention(lab):
    """Squared gradient of the mean loss of each batch of the training batch size, and no factor 1/2."""
    recorder, trainer = lab.run([Ewc(3.0, "online", importance_rows=None, convention="avalanche")])
    ewc = trainer.strategies[0]
    fishers = [plain_fisher(lab, recorder.ends[k], all_rows(trainer, k), group=lab.batch_size) for k in range(3)]
    wanted = {name: sum(fisher[name] for fisher in fishers) for name in fishers[0]}
    lab.close(ewc.importance, wanted, rtol=1e-5, atol=1e-12)
    assert ewc.factor == 3.0


def test_vectorised_and_looped_importances_agree(lab, monkeypatch):
    importances = []
    for vectorised in (True, False):
        monkeypatch.setattr(strategies._importance, "_can_be_vectorised", lambda _, answer=vectorised: answer)
        _, trainer = lab.run([Ewc(labels="all")], Setting.TASK_INCREMENTAL)
        importances.append(trainer.strategies[0].importance)
    lab.close(*importances, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_backbones_have_a_fisher(lab, kind):
    backbone = partial(Recurrent, kind=kind, hidden=6)
    recorder, trainer = lab.run([Ewc(mode="online", gamma=0.0, importance_rows=None)], backbone=backbone)
    wanted = plain_fisher(lab, recorder.ends[-1], all_rows(trainer, 2))
    lab.close(trainer.strategies[0].importance, wanted, rtol=1e-5, atol=1e-12)


def test_importance_is_measured_in_evaluation_mode(lab):
    class Noisy(ToyNet):
        def features(self, inputs):
            return F.dropout(super().features(inputs), 0.5, self.training)

    recorder, trainer = lab.run([Ewc(mode="online", gamma=0.0, importance_rows=None)], backbone=Noisy)
    wanted = plain_fisher(lab, recorder.ends[-1].eval(), all_rows(trainer, 2))
    lab.close(trainer.strategies[0].importance, wanted, rtol=1e-5, atol=1e-12)
    assert trainer.state.model.training


def test_one_parabola_stands_for_many(lab):
    """Closed form of the offline memory: after five random terms, value and gradient are those of their sum."""
    generator = torch.Generator().manual_seed(0)
    ewc = Ewc(1.0)
    terms = [tuple(torch.rand(2, 9, generator=generator, dtype=torch.float64)) for _ in range(5)]
    for f, solution in terms:
        f[:2] = 0  # parameters that no experience used
        ewc._add_parabola({"p": f.clone()}, {"p": solution.clone()})
    p = torch.rand(9, generator=generator, dtype=torch.float64)
    wanted = sum((f * (p - solution).square()).sum() for f, solution in terms)
    lab.close((ewc.importance["p"] * (p - ewc.anchor["p"]).square()).sum() + ewc.offset, wanted, rtol=1e-12)
