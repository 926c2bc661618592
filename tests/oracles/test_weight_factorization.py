"""Factors beside frozen weights, and what is merged of them."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch

import strategies.weight_factorization as module
from cl.core import Setting, UserError
from strategies.ewc import Ewc
from strategies.mas import Mas
from strategies.si import Si
from strategies.weight_factorization import WeightFactorization


def ends(lab, setting=Setting.DOMAIN_INCREMENTAL, **options):
    """Weights and factors before the end of each experience, and weights after it."""
    before, after = [], []

    class Before(lab.Recorder):
        def on_experience_end(self, state):
            before.append(lab.weights(state.model))

    class After(lab.Recorder):
        def on_experience_end(self, state):
            after.append(lab.weights(state.model))

    first = Before()
    first.name = "before"
    second = After()
    second.name = "after"
    recorder, _ = lab.run([first, WeightFactorization(**options), second], setting, epochs=2)
    return recorder, before, after


def product(weights, k):
    return weights[f"up.{k}"] @ weights[f"down.{k}"]


NAMES = ["first.weight", "head.weight"]


def check_base(lab):
    _, before, after = ends(lab, rank=3, alpha=0.7, start="base")
    base = after[0]
    shapes = {tuple(base[f"backbone.{name}"].shape): name for name in NAMES}
    merged = {name: [] for name in NAMES}
    for t in (1, 2):
        for k in range(2):
            change = product(before[t], k)
            name = shapes[tuple(change.shape)]
            # the network stands still while the factors learn
            lab.close(before[t][f"backbone.{name}"], base[f"backbone.{name}"])
            merged[name].append(change)
            assert float(change.norm()) > 1e-3
            assert torch.linalg.matrix_rank(change) <= 3
            wanted = base[f"backbone.{name}"] + 0.7 * torch.stack(merged[name]).mean(0)
            lab.close(after[t][f"backbone.{name}"], wanted)
        lab.close(after[t]["backbone.first.bias"], base["backbone.first.bias"])


def test_the_network_is_the_base_plus_the_mean_of_all_factors(lab):
    check_base(lab)


def test_it_needs_all_factors(lab, monkeypatch):
    whole = module.centralised
    monkeypatch.setattr(module, "centralised", lambda base, merged, alpha: whole(base, merged[-1:], alpha))
    lab.dies(lambda: check_base(lab))


def test_merged_factors_add_up(lab):
    _, before, after = ends(lab, rank=2, alpha=0.5, start="merged")
    shapes = {tuple(after[0][f"backbone.{name}"].shape): name for name in NAMES}
    for t in (1, 2):
        for k in range(2):
            change = product(before[t], k)
            name = f"backbone.{shapes[tuple(change.shape)]}"
            lab.close(after[t][name], after[t - 1][name] + 0.5 * change)


def test_a_step_of_the_factors_is_that_of_the_sum(lab):
    """dL/dB = G A^T and dL/dA = B^T G, with G the gradient by W + B A."""
    recorder, _, _ = ends(lab, rank=3, start="base")
    late = [step for step in recorder.steps if step.experience == 2][5]
    shapes = {tuple(late.before[f"backbone.{name}"].shape): name for name in NAMES}
    shown, index = {}, {}
    for k in range(2):
        change = product(late.before, k)
        name = shapes[tuple(change.shape)]
        shown[name], index[name] = (late.before[f"backbone.{name}"] + change).requires_grad_(), k
    x = late.batch.inputs.flatten(1)
    hidden = (x @ shown["first.weight"].T + late.before["backbone.first.bias"]).relu()
    logits = hidden @ shown["head.weight"].T + late.before["backbone.head.bias"]
    torch.nn.functional.cross_entropy(logits, late.batch.targets).backward()
    for name, k in index.items():
        up, down, g = late.before[f"up.{k}"], late.before[f"down.{k}"], shown[name].grad
        lab.close(late.after[f"up.{k}"], up - lab.lr * g @ down.T)
        lab.close(late.after[f"down.{k}"], down - lab.lr * up.T @ g)
    assert not any(name.startswith("backbone") for name in late.gradients)


def test_factors_begin_without_effect_and_the_first_experience_trains_everything(lab):
    recorder, _, _ = ends(lab, rank=3)
    for experience in (1, 2):
        first = next(step for step in recorder.steps if step.experience == experience)
        assert not first.before["up.0"].any()
        assert first.before["down.0"].any()
    assert "backbone.first.weight" in recorder.steps[0].gradients


def test_factors_begin_without_momentum(lab):
    sgd = OPTIMIZERS["sgd"].func
    recorder, _ = lab.run([WeightFactorization(rank=3)], optimizer=partial(sgd, lr=0.1, momentum=0.9))
    for experience in (1, 2):
        first = next(step for step in recorder.steps if step.experience == experience)
        for name, gradient in first.gradients.items():
            lab.close(first.after[name], first.before[name] - 0.1 * gradient)
        # A is uniform as in LoRA, between -1 / sqrt(D) and 1 / sqrt(D)
        scaled = torch.cat(
            [first.before[f"down.{k}"].flatten() * first.before[f"down.{k}"].shape[1] ** 0.5 for k in (0, 1)]
        )
        assert -1 <= scaled.min() < -0.9 and 0.9 < scaled.max() <= 1


def test_heads_of_single_tasks_are_trained(lab):
    recorder, _, _ = ends(lab, Setting.TASK_INCREMENTAL, rank=3)
    assert "backbone.head.heads.2.weight" in recorder.steps[-1].gradients


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("other", [Ewc(10.0), Si(1.0), Mas(1.0)], ids=lambda other: other.name)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("start", ["base", "merged"])
def test_nothing_moves_the_frozen_network(lab, other, optimizer, start):
    """Not penalties on its parameters, nor the decay, momentum and rates that come with a gradient."""
    factors = WeightFactorization(rank=3, start=start)
    for strategies in ([factors, deepcopy(other)], [deepcopy(other), deepcopy(factors)]):
        recorder, _ = lab.run(strategies, optimizer=OPTIMIZERS[optimizer])
        assert other.name in recorder.steps[-1].terms
        for step in recorder.steps:
            stood = {n for n, p in step.after.items() if torch.equal(step.before[n], p)}
            named = {name for name in step.after if name.startswith("backbone.")}
            assert stood == (named if step.experience else set(step.after) - named), step.experience


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"weight_factorization.rank is 0"),
        ({"alpha": -1}, r"weight_factorization.alpha is -1"),
        ({"start": "last"}, r"weight_factorization.start is 'last'; it must be one of base, merged"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        WeightFactorization(**options)
