"""DER++ against a plain loop that sends every group of rows forward on its own."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cl.core import Setting
from strategies.der import Der
from strategies.derpp import Derpp

ALPHA, BETA, SIZE = 0.7, 0.4, 24
SETTINGS = [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL]


def check(lab, strategy, setting):
    """Same weights after every step, from the rows that were drawn and logits that the loop remembers by itself."""
    recorder, _ = lab.run([strategy], setting)
    model, remembered = deepcopy(recorder.start), {}
    for step in recorder.steps:
        current, *replayed = [step.batch[part.rows] for part in step.batch.parts]
        new = model(current).logits
        loss = F.cross_entropy(new, current.targets)
        if replayed:
            first = replayed[0]
            stored = torch.stack([remembered[row] for row in lab.rows_of(first)])
            loss = loss + ALPHA * (model(first).logits - stored).square().sum() / stored.numel()
        if len(replayed) == 2:
            loss = loss + BETA * F.cross_entropy(model(replayed[1]).logits, replayed[1].targets)
        gradients = lab.gradient(model, loss)
        # logits of the forward pass before the update; every row is seen once
        remembered |= dict(zip(lab.rows_of(current), new.detach(), strict=True))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model))
    assert sum(len(step.batch.parts) > 1 for step in recorder.steps) == len(recorder.steps) - 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_derpp_is_the_plain_loop(lab, setting):
    check(lab, Derpp(capacity=40, replay_batch_size=SIZE, alpha=ALPHA, beta=BETA), setting)


def test_the_oracle_needs_the_logits(lab, monkeypatch):
    monkeypatch.setattr(Der, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab, Derpp(capacity=40, replay_batch_size=SIZE, alpha=ALPHA, beta=BETA), SETTINGS[0]))


def test_the_oracle_needs_logits_from_before_the_update(lab, monkeypatch):
    def too_late(self, state, batch, output):
        self.buffer.add(batch, self.generator(state), logits=state.model(batch).logits.float())

    monkeypatch.setattr(Der, "on_step_end", too_late)
    lab.dies(lambda: check(lab, Derpp(capacity=40, replay_batch_size=SIZE, alpha=ALPHA, beta=BETA), SETTINGS[0]))


def test_draws_are_independent_distinct_and_of_seen_rows(lab):
    recorder, trainer = lab.run([Derpp(capacity=40, replay_batch_size=SIZE, alpha=ALPHA, beta=BETA)])
    seen, num_same = set(), 0
    for step in recorder.steps[4:]:
        first, second = (set(lab.rows_of(step.batch[part.rows])) for part in step.batch.parts[1:])
        assert len(first) == len(second) == SIZE
        num_same += first == second
    for step in recorder.steps:
        for part in step.batch.parts[1:]:
            assert seen.issuperset(lab.rows_of(step.batch[part.rows]))
        seen.update(lab.rows_of(step.batch.current()))
    assert num_same == 0
    assert len(trainer.strategies[0].buffer) == 40


def test_default_draw_is_as_large_as_the_stream_s_batch(lab):
    recorder, _ = lab.run([Derpp()])
    assert [len(part) for part in recorder.steps[-1].batch.parts] == [lab.batch_size] * 3
