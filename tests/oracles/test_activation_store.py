"""Activations in 8 bits and the vote of masked neighbours (steps 6 and 7 of SHARP), by hand."""

from __future__ import annotations

import math

import pytest
import torch

from strategies._activation_store import dequantised, drawn, quantised, votes


def test_eight_bits_are_off_by_half_a_step_at_most():
    values = 7 * torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0)) - 2
    kept = quantised(values)
    assert kept["codes"].dtype == torch.uint8
    assert (kept["codes"].min(), kept["codes"].max()) == (0, 255)
    step = (values.max() - values.min()) / 255
    assert (dequantised(kept) - values).abs().max() <= step / 2 * 1.001
    flat = torch.full((3, 2), -1.5)
    assert torch.equal(dequantised(quantised(flat)), flat)


def test_rows_are_drawn_again_only_when_there_are_too_few():
    generator = torch.Generator().manual_seed(0)
    assert sorted(drawn(5, 5, generator).tolist()) == [0, 1, 2, 3, 4]
    assert len(drawn(3, 50, generator)) == 50 and set(drawn(3, 50, generator).tolist()) == {0, 1, 2}


def test_neighbours_by_hand():
    """Class 0 is seen through the first two units only, where the query points exactly as its vectors do."""
    memory = {
        0: {"vectors": torch.tensor([[1.0, 1.0, 9.0], [2.0, 2.0, -9.0]]), "mask": torch.tensor([True, True, False])},
        1: {"vectors": torch.tensor([[0.0, 0.0, 3.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), "mask": torch.ones(3)},
    }
    query = torch.tensor([[5.0, 5.0, 1.0], [0.1, 0.0, 4.0]])
    found = votes(query, memory, num_neighbours=3, num_outputs=3)
    # distances of the first: 0, 0 (class 0), then class 1: sqrt(2 - 2 * 5 / sqrt(51)) for two of them
    assert found[0].tolist() == pytest.approx([2.0, 1 - math.sqrt(2 - 10 / math.sqrt(51)) / 4, -0.5])
    # distances of the second: to (0, 0, 1) about 0.025; to both of class 0 sqrt(2 - sqrt(2)) = 0.77; all three vote
    near = math.sqrt(2 - 2 * 4 / math.sqrt(16.01))
    assert found[1].tolist() == pytest.approx([2 - math.sqrt(2 - math.sqrt(2)) / 4, 1 - near / 4, -0.5], abs=1e-5)
    assert votes(query, memory, num_neighbours=1, num_outputs=3).argmax(1).tolist() == [0, 1]
