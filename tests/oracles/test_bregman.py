"""The unified objective as a fact: what the strategies add to the loss is a Bregman divergence, to 1e-6.

Each test runs the strategy itself and reads the term that the loop logged; the other side is written with `bregman`
alone.
"""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from cl.core import Batch, Setting
from strategies._bregman import (
    bernoulli_negative_entropy,
    bregman,
    gaussian_log_partition,
    gaussian_natural,
    negative_entropy,
    quadratic,
    squared_norm,
)
from strategies.der import Der
from strategies.derpp import Derpp
from strategies.ewc import Ewc
from strategies.icarl import Icarl
from strategies.lwf import Lwf
from strategies.mas import Mas
from strategies.replay import Replay
from strategies.si import Si

CLASS = Setting.CLASS_INCREMENTAL


def mean_over_rows(function, p, q):
    return torch.stack([bregman(function, *pair) for pair in zip(p, q, strict=True)]).mean()


def same(found, wanted):
    """To 1e-6, and about something: a sum of zeros would agree as well."""
    assert abs(found - wanted.item()) <= 1e-6 * max(1.0, abs(wanted.item()))
    return abs(found) > 1e-3


def steps_of(recorder, experience=None):
    """(step, the model as it was before it) of the later experiences."""
    model = deepcopy(recorder.start)
    for step in recorder.steps:
        if step.experience > 0 and experience in (None, step.experience):
            model.load_state_dict(step.before)
            yield step, model


def labels_as_reference(logits, rows):
    """CE(y, softmax(z)) as the divergence of the model's distribution from the one-hot label."""
    one_hot = F.one_hot(rows.targets, logits.shape[1]).to(logits.dtype)
    return mean_over_rows(negative_entropy, one_hot, logits.softmax(1))


def test_er(lab):
    recorder, _ = lab.run([Replay(capacity=40, replay_batch_size=8, weight=0.7)], CLASS)
    is_something = []
    for step, model in steps_of(recorder):
        current, replayed = (step.batch[part.rows] for part in step.batch.parts)
        replay_term = step.terms["cross_entropy"] - lab.label_loss(model, current).item()
        is_something.append(same(replay_term, 0.7 * labels_as_reference(model(replayed).logits, replayed)))
    assert all(is_something)


def test_der_and_derpp(lab):
    for strategy in (Der(40, 8, alpha=0.6), Derpp(40, 8, alpha=0.6, beta=0.3)):
        recorder, trainer = lab.run([strategy], CLASS)
        model, remembered, num = deepcopy(recorder.start), {}, 0
        for step in recorder.steps:
            model.load_state_dict(step.before)
            current, *replayed = [step.batch[part.rows] for part in step.batch.parts]
            if replayed:
                new = model(replayed[0]).logits
                stored = torch.stack([remembered[row] for row in lab.rows_of(replayed[0])])
                distance = 0.6 / new.shape[1] * mean_over_rows(squared_norm, new, stored)
                num += same(step.terms[strategy.name], distance)
            if len(replayed) == 2:
                label_term = step.terms["cross_entropy"] - lab.label_loss(model, current).item()
                same(label_term, 0.3 * labels_as_reference(model(replayed[1]).logits, replayed[1]))
            remembered |= dict(zip(lab.rows_of(current), model(current).logits.detach(), strict=True))
        assert num > 20
        assert trainer.state.info.num_outputs == new.shape[1]


@pytest.mark.parametrize("convention", ["plain", "hinton"])
def test_lwf(lab, convention):
    temperature = 1.7
    recorder, _ = lab.run([Lwf(3.0, temperature, convention)], CLASS)
    num = 0
    for step, model in steps_of(recorder):
        old = list(range(2 * step.experience))
        teacher = recorder.ends[step.experience - 1]
        old_p, new_p = ((m(step.batch).logits[:, old] / temperature).softmax(1) for m in (teacher, model))
        wanted = 3.0 * mean_over_rows(negative_entropy, old_p, new_p)
        num += same(step.terms["lwf"], wanted * (temperature**2 if convention == "hinton" else 1))
    assert num > 5


def test_icarl(lab):
    """Binary cross-entropy is the divergence plus the entropy of the targets, which no weight changes."""
    recorder, _ = lab.run([Icarl(capacity=30, replay_batch_size=8)], CLASS)
    num = 0
    for step, model in steps_of(recorder):
        k = step.experience
        rows = Batch.cat([step.batch[part.rows] for part in step.batch.parts])
        targets = F.one_hot(rows.targets, 6).double()
        targets[:, : 2 * k] = recorder.ends[k - 1](rows).logits[:, : 2 * k].sigmoid()
        targets, said = targets[:, : 2 * k + 2], model(rows).logits[:, : 2 * k + 2].sigmoid()
        divergence = mean_over_rows(bernoulli_negative_entropy, targets, said)
        entropy = -torch.stack([bernoulli_negative_entropy(target) for target in targets]).mean()
        num += same(step.terms["icarl"], (divergence + entropy) / (2 * k + 2))
    assert num == 24


def check_quadratic(lab, strategy, convex):
    """The term of every step of the second experience; later ones are the same sum with other numbers."""
    recorder, trainer = lab.run([strategy], lab.stream_of(CLASS).first(2))
    kept = trainer.strategies[0]
    first = {name: p.detach().clone() for name, p in recorder.ends[0].named_parameters()}
    importance = first_importance(lab, strategy)
    num = 0
    for step, model in steps_of(recorder):
        theta, old = lab.flat(lab.weights(model)), lab.flat(first)
        found = step.terms.get(strategy.name)
        num += same(found, bregman(convex(lab.flat({n: importance[n] for n in first})), theta, old))
    assert num > 5 and kept.strength > 0


def first_importance(lab, strategy):
    """Importance after one experience, from a run that ends there."""
    again = type(strategy)(**made[type(strategy)])
    lab.run([again], lab.stream_of(CLASS).first(1))
    return {name: again.weights(name) for name in again.importance}


made = {
    Ewc: {"strength": 40.0, "importance_rows": None},
    Mas: {"strength": 0.5, "importance_rows": None},
    Si: {"strength": 2.0},
}


@pytest.mark.parametrize(
    ("kind", "convex"),
    [
        (Ewc, lambda fisher: quadratic(40.0 / 2 * fisher)),
        (Mas, lambda omega: quadratic(0.5 * omega)),
        (Si, lambda omega: quadratic(2.0 * omega)),
    ],
)
def test_quadratic_penalties(lab, kind, convex):
    check_quadratic(lab, kind(**made[kind]), convex)


# rows of the table that no strategy here carries


def test_cpr_entropy():
    """Maximising the output's entropy is minimising its divergence from the uniform distribution."""
    p = torch.randn(7, 5, dtype=torch.float64).softmax(1)
    uniform = torch.full((7, 5), 0.2, dtype=torch.float64)
    entropy = torch.distributions.Categorical(p).entropy()
    found = torch.stack([bregman(negative_entropy, *pair) for pair in zip(p, uniform, strict=True)])
    torch.testing.assert_close(found, math.log(5) - entropy, rtol=0, atol=1e-12)


def test_vcl_gaussians():
    generator = torch.Generator().manual_seed(0)
    mean, old_mean = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    variance, old_variance = torch.rand(2, 9, generator=generator, dtype=torch.float64) + 0.1
    wanted = kl_divergence(Normal(mean, variance.sqrt()), Normal(old_mean, old_variance.sqrt())).sum()
    new, old = gaussian_natural(mean, variance), gaussian_natural(old_mean, old_variance)
    found = bregman(gaussian_log_partition, old, new)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


def test_natural_gradient():
    """The step that minimises <g, d> + D(theta + d, theta) / rate, D the Fisher quadratic, is -rate g / F."""
    generator = torch.Generator().manual_seed(0)
    g, fisher, theta = torch.rand(3, 6, generator=generator, dtype=torch.float64) + 0.1
    psi = quadratic(fisher / 2)
    step = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(torch.dot(g, step) + bregman(psi, theta + step, theta) / 0.3, step, create_graph=True)
    torch.testing.assert_close(found[0], g)
    minimiser = -0.3 * g / fisher
    at = (torch.dot(g, minimiser) + bregman(psi, theta + minimiser, theta) / 0.3).item()
    for _ in range(20):
        other = minimiser + 0.01 * torch.randn(6, generator=generator, dtype=torch.float64)
        assert torch.dot(g, other) + bregman(psi, theta + other, theta) / 0.3 > at


# the helper itself


@pytest.mark.parametrize("function", [negative_entropy, bernoulli_negative_entropy, squared_norm])
def test_divergence_is_zero_at_home_and_positive_elsewhere(function):
    p, q = torch.rand(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
    assert abs(float(bregman(function, p, p))) < 1e-15
    assert bregman(function, p, q) > 1e-3


def test_divergence_is_not_symmetric():
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.6])
    assert abs(float(bregman(negative_entropy, p, q) - bregman(negative_entropy, q, p))) > 0.01
    kl = (p * (p / q).log()).sum()
    torch.testing.assert_close(bregman(negative_entropy, p, q), kl)


def test_the_oracle_needs_the_slope(lab, monkeypatch):
    """Without its linear term the divergence is none of the penalties."""
    monkeypatch.setitem(globals(), "bregman", lambda function, p, q: function(p) - function(q))
    lab.dies(lambda: test_lwf(lab, "plain"))
