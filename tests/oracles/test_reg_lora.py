"""RegLoRA against its equation, written out over the adapters of every layer."""

from __future__ import annotations

import pytest
import torch

from strategies.reg_lora import RegLora


def reg_lora_check(lab, lora, measure):
    top, strength = 25.0, 0.3 if measure == "absolute" else 0.02
    recorder, trainer = lora.trained(RegLora(strength, top, measure))
    marked = dict.fromkeys(lora.A)
    for experience in (1, 2):
        for layer in lora.A:
            a, b = lora.adapters(lora.of(recorder, experience - 1)[-1].after, layer)
            size = (lora.SCALE * b @ a).abs()
            smallest = size.flatten().sort(descending=True).values[round(size.numel() * top / 100) - 1]
            new = size >= smallest
            marked[layer] = new if marked[layer] is None else new | marked[layer]
        for step in lora.of(recorder, experience)[1::5]:
            total = 0.0
            for layer in lora.A:
                a, b = lora.adapters(step.before, layer)
                change = (lora.SCALE * b @ a)[marked[layer]]
                total += strength * (change.abs() if measure == "absolute" else change**2).sum()
            assert total > 0
            lab.close(step.terms.get("reg_lora", 0.0), total, rtol=1e-5, atol=1e-9)
    for name, mask in trainer.strategies[0].marked.items():
        assert torch.equal(mask, marked[name.rpartition(".")[2]])


@pytest.mark.parametrize("measure", ["absolute", "squared"])
def test_reg_lora_holds_the_largest_entries_of_every_experience(lab, lora, measure):
    reg_lora_check(lab, lora, measure)


def test_the_oracle_needs_the_marks(lab, lora, monkeypatch):
    monkeypatch.setattr(RegLora, "penalty", lambda *_: None)
    lab.dies(lambda: reg_lora_check(lab, lora, "absolute"))


def test_marks_are_kept_as_bits(lora):
    _, trainer = lora.trained(RegLora(0.3, 25.0))
    saved, copy = trainer.strategies[0].state_dict(), RegLora()
    # 12 x 8 entries of the embedding and of the head are 12 bytes each
    assert [(bits.dtype, len(bits)) for bits in saved["bits"].values()] == [(torch.uint8, 12)] * 2
    copy.load_state_dict(saved)
    assert all(torch.equal(mask, trainer.strategies[0].marked[name]) for name, mask in copy.marked.items())
