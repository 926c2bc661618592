"""I-LoRA against its equations: the plain loss, the pull to the slow adapter, and its moving mean."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cl.core import IGNORED, Batch
from strategies.i_lora import ILora


def i_lora_check(lab, lora, target="slow", decay=0.9, weight=0.5, gamma=0.8):
    recorder, trainer = lora.trained(ILora(40, 10, weight, gamma, decay, target))
    fast, slow_model = deepcopy(recorder.start), deepcopy(recorder.start)
    slow = {name: p.clone() for name, p in recorder.start.named_parameters() if p.requires_grad}
    for number, step in enumerate(recorder.steps, start=1):
        assert len(step.batch.parts) == (1 if step.experience == 0 else 2)
        if step.experience and number % 4 == 0:
            current, stored = (step.batch[part.rows] for part in step.batch.parts)
            fast.load_state_dict(step.before, strict=False)
            slow_model.load_state_dict(slow, strict=False)

            def ce(rows):
                return F.cross_entropy(fast(rows).logits.flatten(0, 1), rows.targets.flatten())

            was = slow_model(stored).hidden.detach()
            if target == "max":
                was = torch.maximum(was, fast(stored).hidden.detach())
            loss = (ce(current) + weight * ce(stored)) / (1 + weight)
            loss = loss + gamma * ((fast(stored).hidden - was) ** 2).mean()
            trainable = [p for p in fast.parameters() if p.requires_grad]
            names = [name for name, p in fast.named_parameters() if p.requires_grad]
            wanted = dict(zip(names, torch.autograd.grad(loss, trainable), strict=True))
            lab.close(step.gradients, wanted, 1e-4, 1e-6)
            assert gamma * ((fast(stored).hidden - was) ** 2).mean() > 1e-6
        a = min(1 - 1 / (number + 1), decay)
        slow = {name: a * value + (1 - a) * step.after[name] for name, value in slow.items()}
        if number == 1:
            assert a == 0.5
    lab.close(trainer.strategies[0].slow, slow, 1e-9, 1e-12)
    return trainer, slow_model, slow


@pytest.mark.parametrize("target", ["slow", "max"])
def test_i_lora_is_the_plain_loss_and_the_moving_mean(lab, lora, target):
    i_lora_check(lab, lora, target)


def test_a_step_is_the_same_in_four_pieces(lab, lora):
    """Of which two show two stored rows and two show three."""
    ends = []
    for accumulation in (1, 4):
        cut = {"batch_size": 16 // accumulation, "accumulation": accumulation}
        _, trainer = lora.trained(ILora(40, 10, 0.5, 0.8, 0.9), max_steps=4, epochs=None, **cut)
        ends.append(lab.weights(trainer.state.model))
    lab.close(ends[1], ends[0], 1e-5, 1e-8)


@pytest.mark.parametrize("part", ["pull", "mean"])
def test_the_oracle_needs_the_slow_adapter(lab, lora, monkeypatch, part):
    if part == "pull":
        monkeypatch.setattr(ILora, "penalty", lambda *_: None)
    else:
        monkeypatch.setattr(ILora, "on_run_start", lambda self, state: setattr(self, "slow", _lora_copy(state)))
    lab.dies(lambda: i_lora_check(lab, lora))


def _lora_copy(state):
    return {name: torch.zeros_like(p) for name, p in state.parameters().items()}


def test_the_slow_adapter_answers(lab, lora):
    trainer, slow_model, slow = i_lora_check(lab, lora)
    slow_model.load_state_dict(slow, strict=False)
    fast = lora.trained(ILora(40, 10, 0.5, 0.8, 0.9, evaluate="fast"))[1].ledger.result
    data = trainer.state.stream.eval_sets[0].load()
    rows = data.rows(torch.arange(len(data)))
    losses = [
        F.cross_entropy(model(rows).logits.flatten(0, 1), rows.targets.flatten()).item()
        for model in (slow_model, trainer.state.model)
    ]
    assert trainer.ledger.result.R[-1][0] == pytest.approx(losses[0], rel=1e-5)
    assert fast.R[-1][0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - losses[1]) > 1e-3


def test_what_the_slow_adapter_says_is_said_in_evaluation_mode(lab, lora):
    """Without dropout, which is of the step that learns."""
    modes, around = [], []

    class Heard(ILora):
        def _answer(self, state, rows):
            modes.append(state.model.training)
            return super()._answer(state, rows)

        def penalty(self, state, batch, output):
            was, before = state.model.training, len(modes)
            found = super().penalty(state, batch, output)
            around.append((was, state.model.training, len(modes) - before))
            return found

    lora.trained(Heard(40, 10), max_steps=3, epochs=None)
    assert around == [(True, True, int(number >= 3)) for number in range(9)]
    assert not any(modes)


def test_tokens_that_are_not_learnt_are_not_pulled(lab, lora):
    strategy = ILora(10)
    recorder, trainer = lora.trained(strategy, max_steps=3, epochs=None)
    batch = recorder.steps[0].batch.current()
    rows = Batch(batch.inputs, batch.targets.clone(), batch.experience_id, batch.sample_ids)
    mixed = batch.extended(rows, "replay", "i_lora")
    output = trainer.state.model(mixed)
    whole = strategy.penalty(trainer.state, mixed, output)
    mixed.targets[16:, 2:] = IGNORED
    some = strategy.penalty(trainer.state, mixed, output)
    slow = strategy._answer(trainer.state, rows).hidden
    wanted = (output.hidden[16:] - slow)[:, :2].square().mean()
    lab.close(some.detach(), wanted.detach(), 1e-5, 1e-9)
    assert not torch.allclose(whole, some)
    mixed.targets[16:] = IGNORED
    assert strategy.penalty(trainer.state, mixed, output).item() == 0.0
