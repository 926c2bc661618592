"""O-LoRA against its equation, written out over the adapters of every layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from strategies.o_lora import OLora


def o_lora_check(lab, lora, measure, decay):
    recorder, trainer = lora.trained(OLora(0.5, decay, measure))
    ends = [lora.of(recorder, k)[-1].after for k in range(2)]
    for step in (*lora.of(recorder, 1)[::5], *lora.of(recorder, 2)[::5]):
        total = 0.0
        for layer in lora.A:
            a, b = lora.adapters(step.before, layer)
            for past in ends[: step.experience]:
                for row in next(lora.adapters(past, layer)):
                    for new in a:
                        inner = (row * new).sum()
                        total += 0.5 * (abs(inner) if measure == "absolute" else inner**2)
            total += decay * (a.square().sum().sqrt() + b.square().sum().sqrt())
        assert total > 0
        lab.close(step.terms.get("o_lora", 0.0), total, rtol=1e-5, atol=1e-7)
    assert [rows.shape[0] for rows in trainer.strategies[0].past.values()] == [2 * lora.RANK] * 2


@pytest.mark.parametrize(("measure", "decay"), [("absolute", 0.0), ("squared", 0.1)])
def test_o_lora_is_the_sum_of_all_inner_products(lab, lora, measure, decay):
    o_lora_check(lab, lora, measure, decay)


def test_the_oracle_needs_the_past(lab, lora, monkeypatch):
    monkeypatch.setattr(OLora, "penalty", lambda *_: None)
    lab.dies(lambda: o_lora_check(lab, lora, "absolute", 0.0))


def test_o_lora_is_the_frozen_sum_of_all_adapters(lora):
    """W_0 and every adapter that was ever finished make the weights of the last experience."""
    recorder, trainer = lora.trained(OLora())
    first, last = recorder.start, trainer.state.model
    for layer in lora.A:
        total = getattr(first, layer).base_layer.weight.clone()
        for k in range(2):
            a, b = lora.adapters(lora.of(recorder, k)[-1].after, layer)
            change = lora.SCALE * b @ a
            total += change.T if layer == "first" else change
        torch.testing.assert_close(getattr(last, layer).base_layer.weight, total)
        assert lora.of(recorder, 2)[0].before[lora.B["head"]].abs().max() == 0


def test_a_stronger_penalty_makes_subspaces_more_orthogonal(lora):
    cosines = []
    for strength in (0.0, 2.0):
        recorder, _ = lora.trained(OLora(strength), epochs=3)
        ends = [next(lora.adapters(lora.of(recorder, k)[-1].after, "head")) for k in range(2)]
        left, right = (F.normalize(each, dim=1) for each in ends)
        cosines.append((left @ right.T).abs().mean().item())
    assert cosines[1] < 0.6 * cosines[0], cosines
