"""A-GEM against the closed form, on gradients recorded before and after it."""

from __future__ import annotations

import pytest
import torch

import strategies.agem
from cl.core import Setting, UserError
from cl.testing import toy_stream
from strategies.agem import Agem

SETTINGS = [Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL]


class WithReference:
    """Recorder factory: beside the gradients it notes the gradient of the loss on the whole memory."""

    @staticmethod
    def make(lab, agem):
        class Reference(lab.Recorder):
            def on_gradients(self, state):
                super().on_gradients(state)
                buffer = agem.buffer
                if len(buffer):
                    rows = state.prepare(buffer.rows(torch.arange(len(buffer))))
                    self.steps[-1].reference = lab.gradient(state.model, lab.label_loss(state.model, rows))

        return Reference()


def check(lab, setting):
    """Draws as large as the memory make the reference known; returns how many steps were projected."""
    agem = Agem(capacity=30, replay_batch_size=30)
    before = WithReference.make(lab, agem)
    after, _ = lab.run([before, agem], setting, epochs=2)
    num_projected = num_free = 0
    for first, last in zip(before.steps, after.steps, strict=True):
        if not hasattr(first, "reference"):
            lab.close(last.gradients, first.gradients, rtol=0, atol=0)
            continue
        r = lab.flat(first.reference)
        g, edited = (
            lab.flat({n: grads.get(n, torch.zeros_like(z)) for n, z in first.reference.items()})
            for grads in (first.gradients, last.gradients)
        )
        assert edited @ r >= -1e-6 * r.norm() * g.norm()
        if g @ r < 0:
            num_projected += 1
            lab.close(edited, g - (g @ r) / (r @ r) * r)
            # nearest: what was taken away is along r only
            assert abs((g - edited) @ r) == pytest.approx(float((g - edited).norm() * r.norm()), rel=1e-5)
        else:
            num_free += 1
            lab.close(last.gradients, first.gradients, rtol=0, atol=0)
    assert num_projected > 3
    assert num_free > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_agem_is_the_closed_form(lab, setting):
    check(lab, setting)


def test_the_oracle_needs_the_projection(lab, monkeypatch):
    monkeypatch.setattr(strategies.agem, "project", lambda gradient, reference: gradient)
    lab.dies(lambda: check(lab, SETTINGS[0]))


def test_heads_outside_the_step_stay_without_gradient(lab):
    """Momentum and weight decay must go on leaving them alone."""
    recorder, _ = lab.run([Agem(capacity=30)], Setting.TASK_INCREMENTAL)
    assert all("head.heads.2.weight" not in step.gradients for step in recorder.steps if step.experience < 2)


@pytest.mark.parametrize(("memory", "kept"), [("per_experience", [13, 13, 13]), ("one_batch", [16, 16, 8])])
def test_memory_policy(lab, memory, kept):
    """40 rows: a third each, or one batch of 16 each and a reservoir sample once they are too many."""
    _, trainer = lab.run([Agem(capacity=40, memory=memory)])
    counts = trainer.strategies[0].buffer.columns["experience_id"][: len(trainer.strategies[0].buffer)].bincount()
    if memory == "per_experience":
        assert counts.tolist() == kept
    else:
        assert counts.sum() == 40
        assert counts.max() <= 16


def test_first_batches_are_kept_whole(lab):
    _, trainer = lab.run([Agem(capacity=48, memory="one_batch")])
    assert trainer.strategies[0].buffer.columns["experience_id"].bincount().tolist() == [16, 16, 16]


def test_too_small_a_memory_is_refused():
    with pytest.raises(UserError, match=r"agem.capacity is 2; it must be at least 3"):
        Agem(capacity=2).check(toy_stream(Setting.DOMAIN_INCREMENTAL))
    Agem(capacity=2, memory="one_batch").check(toy_stream(Setting.DOMAIN_INCREMENTAL))
