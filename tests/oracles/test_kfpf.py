"""k-FPF: when it finetunes, and what one finetuning does with labels and with logits."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cl.core import Setting, UserError
from cl.testing import naive_run, toy_stream, train
from strategies.der import Der
from strategies.kfpf import Kfpf
from strategies.replay import Replay

CLASS = Setting.CLASS_INCREMENTAL
STEPS = 36
"""Of a toy run of one epoch: three experiences of twelve."""


class Watched(Kfpf):
    """Notes after how many steps it finetunes, the weights around it, the rows and slots it draws."""

    def on_run_start(self, state):
        super().on_run_start(state)
        self.times, self.moves, self.rows = [], [], []

    def finetune(self, state):
        before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
        self.times.append(state.step)
        self.rows.append([])
        super().finetune(state)
        self.moves.append((before, {n: p.detach().clone() for n, p in state.model.named_parameters()}))

    def _loss(self, state, buffer):
        prepare = type(state).prepare

        def noting(rows, generator=None):
            self.rows[-1].append(prepare(state, rows, generator))
            return self.rows[-1][-1]

        state.prepare = noting
        try:
            return super()._loss(state, buffer)
        finally:
            del state.prepare


Watched.name = "kfpf"


def times(lab, stream=CLASS, **arguments):
    kfpf = Watched(capacity=40, steps=1, replay_batch_size=8, modules="all", **arguments)
    lab.run([kfpf], stream)
    return kfpf.times


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 18])
def test_k_finetunings_evenly_spread_the_last_at_the_end(lab, k):
    assert times(lab, k=k) == [math.floor(j * STEPS / k + 0.5) for j in range(1, k + 1)]


def test_by_hand(lab):
    assert times(lab, k=5) == [7, 14, 22, 29, 36]
    assert times(lab, period_steps=10) == [10, 20, 30, 36]
    assert times(lab, period_steps=12) == [12, 24, 36]
    assert times(lab, period_steps=500) == [36]


def test_boundaries_do_not_matter(lab):
    """The same steps in a stream of two experiences of the same length; its run has 24 steps."""
    assert times(lab, toy_stream(CLASS, num_experiences=2), k=5) == [5, 10, 14, 19, 24]


def check(lab, alpha=0.5):
    """Every finetuning, from the rows drawn and the logits that the loop remembers by itself."""
    kfpf = Watched(k=3, modules=["head"], alpha=alpha, capacity=40, steps=6, replay_batch_size=8, lr=0.2, momentum=0.8)
    recorder, _ = lab.run([kfpf], CLASS)
    remembered, model, done = {}, deepcopy(recorder.start), 0
    for number, step in enumerate(recorder.steps, start=1):
        model.load_state_dict(step.before)
        logits = model(step.batch).logits.detach()
        remembered |= dict(zip(lab.rows_of(step.batch), logits, strict=True))
        if number not in kfpf.times:
            continue
        before, after = kfpf.moves[done]
        lab.close(before, step.after, rtol=0, atol=0)
        model.load_state_dict(before)
        velocity = dict.fromkeys(before, 0.0)
        for j, rows in enumerate(kfpf.rows[done]):
            new = model(rows).logits
            stored = torch.stack([remembered[row] for row in lab.rows_of(rows)])
            loss = F.cross_entropy(new, rows.targets) + alpha * (new - stored).square().sum() / stored.numel()
            gradients = lab.gradient(model, loss)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.startswith("head"):
                        velocity[name] = 0.8 * velocity[name] + gradients[name]
                        p -= 0.1 * (1 + math.cos(math.pi * j / 6)) * velocity[name]
        lab.close(after, lab.weights(model), rtol=1e-6)
        done += 1
    assert done == 3


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_labels_and_logits(lab, alpha):
    check(lab, alpha)


def test_the_oracle_needs_the_logits(lab, monkeypatch):
    monkeypatch.setattr("strategies._finetune.F.mse_loss", lambda *_: torch.zeros(()))
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_trigger(lab, monkeypatch):
    monkeypatch.setattr(Kfpf, "is_due", lambda *_: False)
    lab.dies(lambda: check(lab))


def test_training_goes_on_from_the_finetuned_weights(lab):
    kfpf = Watched(k=3, modules="all", capacity=40, steps=6, replay_batch_size=8)
    recorder, _ = lab.run([kfpf], CLASS)
    for time, (_, after) in zip(kfpf.times[:-1], kfpf.moves, strict=False):
        lab.close(recorder.steps[time].before, after, rtol=0, atol=0)


def test_rows_are_those_of_k_finetunings():
    run, naive = train(CLASS, [Kfpf(k=4, capacity=40, steps=5, replay_batch_size=8, repeats=2)]), naive_run(CLASS)
    assert run.trainer.state.spent.backwards - naive.trainer.state.spent.backwards == 4 * 2 * 5 * 8
    declared = [cost.backwards for cost in run.declared]
    assert declared.count(0) == len(declared) - 3 and set(declared) == {0, 80}


def test_an_experience_that_ends_on_a_trigger_is_measured_after_it():
    runs = {k: train(CLASS, [Kfpf(k=k, modules="all", capacity=60, steps=40)]).result.R for k in (1, 3)}
    assert runs[3][1][0] > runs[1][1][0] + 0.1, "accuracy on the first experience after the second one"


@pytest.mark.parametrize("other", [Replay, Der])
def test_cost_with_a_borrowed_buffer_is_declared(other):
    kfpf = Kfpf(period_steps=7, buffer_of=other(40).name, steps=2, replay_batch_size=8)
    run = train(CLASS, [other(40), kfpf])
    assert [(c.forwards, c.backwards) for c in run.declared] == [(c.forwards, c.backwards) for c in run.counted]


def test_logits_of_another_strategy():
    assert train(CLASS, [Der(40), Kfpf(buffer_of="der", alpha=0.5, steps=2)]).result.status == "done"
    with pytest.raises(UserError, match=r"kfpf.alpha needs stored logits, and replay stores none; take 0, or der"):
        train(CLASS, [Replay(40), Kfpf(buffer_of="replay", alpha=0.5, steps=2)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"k": 0}, "kfpf.k is 0; it must be an integer of at least 1"),
        ({"period_steps": 0}, "kfpf.period_steps is 0; it must be an integer of at least 1, or null for"),
        ({"period_steps": 1}, "kfpf.period_steps is 1; it must be at least 2"),
        ({"alpha": -1}, "kfpf.alpha is -1; it must be a finite number of at least 0"),
        ({"modules": ""}, "kfpf.modules is ''; it must be auto, all, or a list"),
        ({"capacity": 8}, "kfpf.replay_batch_size is 32; it must be at most kfpf.capacity, 8"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(UserError) as found:
        Kfpf(**arguments)
    assert str(found.value).startswith(sentence)


def test_more_finetunings_than_the_run_has_room_for(lab):
    """One after every step but the first, which fills the buffer."""
    assert times(lab, k=60) == list(range(2, STEPS + 1))
    assert times(lab, k=30) == sorted({math.floor(j * STEPS / 30 + 0.5) for j in range(1, 31)} - {1})
