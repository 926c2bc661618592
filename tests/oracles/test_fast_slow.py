"""Fast and slow weights against a plain loop with Fisher information taken row by row."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cl.core import Setting, UserError
from strategies.fast_slow import FastSlow

STRENGTH, EPSILON, GAMMA = 7.0, 0.3, 0.8
SETTINGS = [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL]


def fisher_of(lab, model, rows):
    """Mean over rows of the squared gradient of the row's own loss."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(len(rows)):
        one = rows[torch.tensor([row])]
        for name, g in lab.gradient(model, F.cross_entropy(model(one).logits, one.targets)).items():
            total[name] += g.square() / len(rows)
    return total


def check(lab, setting=Setting.CLASS_INCREMENTAL, epsilon=EPSILON, strength=STRENGTH):
    strategy = FastSlow(strength, epsilon, GAMMA, importance_rows=None)
    recorder, trainer = lab.run([strategy], setting)
    state, model = trainer.state, deepcopy(recorder.start)
    slow, importance = lab.weights(model), None
    steps = iter(recorder.steps)
    for experience in state.stream.experiences:
        for _ in range(192 // lab.batch_size):
            step = next(steps)
            loss = lab.label_loss(model, step.batch)
            if importance:
                pulls = [(importance[n] * (p - slow[n]) ** 2).sum() for n, p in model.named_parameters()]
                loss = loss + strength / 2 * sum(pulls)
            gradients = lab.gradient(model, loss)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= lab.lr * gradients[name]
            lab.close(step.after, lab.weights(model), rtol=1e-4, atol=1e-6)
        share = epsilon if importance else 1.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(slow[name] + share * (p - slow[name]))
        slow = lab.weights(model)
        new = fisher_of(lab, model, state.prepare(experience.load().rows(torch.arange(192))))
        importance = {n: f + GAMMA * importance[n] for n, f in new.items()} if importance else new
    lab.close(lab.weights(state.model), slow, rtol=1e-4, atol=1e-6)
    lab.close(strategy.importance, importance, rtol=1e-3, atol=1e-8)
    assert next(steps, None) is None


@pytest.mark.parametrize("setting", SETTINGS)
def test_fast_slow_is_the_plain_loop(lab, setting):
    check(lab, setting)


def test_a_weak_pull_is_one_too(lab):
    check(lab, strength=0.5)


def test_nothing_is_kept_where_it_does_nothing(lab):
    recorder, trainer = lab.run([strategy := FastSlow(0.0, 1.0)])
    assert not strategy.anchor and not strategy.importance
    lab.close(lab.weights(trainer.state.model), recorder.steps[-1].after, rtol=0, atol=0)


def test_epsilon_1_keeps_the_fast_weights(lab):
    check(lab, epsilon=1.0)


def test_the_oracle_needs_the_slow_weights(lab, monkeypatch):
    end = FastSlow.on_experience_end

    def fast(self, state):
        self.epsilon = 1.0
        end(self, state)

    monkeypatch.setattr(FastSlow, "on_experience_end", fast)
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_pull(lab, monkeypatch):
    monkeypatch.setattr(FastSlow, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab))


def test_without_strength_only_the_slow_step_is_left(lab):
    recorder, trainer = lab.run([strategy := FastSlow(0.0, 0.25)])
    assert not strategy.importance
    fast = recorder.steps[-1].after
    starts = next(step.before for step in recorder.steps if step.experience == 2)
    wanted = {name: starts[name] + 0.25 * (fast[name] - starts[name]) for name in fast}
    lab.close(lab.weights(trainer.state.model), wanted)


def test_bad_arguments_are_refused():
    for name, value in (("epsilon", 0), ("epsilon", 1.5), ("gamma", 2), ("strength", -1)):
        with pytest.raises(UserError, match=rf"fast_slow\.{name} is {value}"):
            FastSlow(**{name: value})
