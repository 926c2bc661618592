"""The untrained capacity probe against rules written out, and both against the table measured on the method card."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "capacity_probe.py"

RULES = ("delta", "linear", "ridge", "ridge, decay 0.9")


@pytest.fixture(scope="module")
def probe():
    spec = importlib.util.spec_from_file_location("capacity_probe", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linear(keys, values, queries):
    memory = torch.zeros(len(keys), keys.shape[2], values.shape[2], dtype=keys.dtype)
    for k, v in zip(keys.unbind(1), values.unbind(1), strict=True):
        memory = memory + k.unsqueeze(2) * v.unsqueeze(1)
    return queries @ memory


def delta(keys, values, queries):
    memory = torch.zeros(len(keys), keys.shape[2], values.shape[2], dtype=keys.dtype)
    for k, v in zip(keys.unbind(1), values.unbind(1), strict=True):
        wrong = (k.unsqueeze(1) @ memory).squeeze(1) - v
        memory = memory - k.unsqueeze(2) * wrong.unsqueeze(1)
    return queries @ memory


def ridge(keys, values, queries, decay=1.0):
    gram = torch.zeros(len(keys), keys.shape[2], keys.shape[2], dtype=keys.dtype)
    moment = torch.zeros(len(keys), keys.shape[2], values.shape[2], dtype=keys.dtype)
    for k, v in zip(keys.unbind(1), values.unbind(1), strict=True):
        gram = decay * gram + k.unsqueeze(2) * k.unsqueeze(1)
        moment = decay * moment + k.unsqueeze(2) * v.unsqueeze(1)
    strength = 0.02 * gram.flatten(1).norm(dim=1)
    return queries @ torch.linalg.solve(gram + strength.view(-1, 1, 1) * torch.eye(keys.shape[2]), moment)


PLAIN = {"linear": linear, "delta": delta, "ridge": ridge, "ridge, decay 0.9": partial(ridge, decay=0.9)}


def spread(share, answers):
    """Four binomial deviations of two measurements, and the rounding of the card."""
    return 4 * (2 * max(share * (1 - share), 0.002) / answers) ** 0.5 + 0.005


@pytest.mark.parametrize("name", RULES[:3])
def test_distinct_keys_are_the_cards_table(probe, name):
    for share, wanted in zip(probe.SHARES, probe.CARD[0][name], strict=True):
        pairs = round(32 * share)
        assert probe.capacity(PLAIN[name], pairs) == pytest.approx(wanted, abs=spread(wanted, 40 * pairs))


@pytest.mark.parametrize("name", RULES)
def test_changed_keys_are_the_cards_table(probe, name):
    for keys, wanted in zip(probe.REASSIGNED, probe.CARD[1][name], strict=True):
        assert probe.capacity(PLAIN[name], keys, keys // 2) == pytest.approx(wanted, abs=spread(wanted, 40 * keys))


@pytest.mark.parametrize("name", RULES)
def test_the_kernels_answer_as_the_rules_written_out(probe, name):
    """To the answer: reading differs by the thirty steps of the solver at most."""
    for keys, changed in ((32, 0), (16, 8)):
        ours = probe.capacity(probe.CHANGING[name], keys, changed, num_trials=10)
        assert ours == pytest.approx(
            probe.capacity(PLAIN[name], keys, changed, num_trials=10), abs=1 / (10 * keys) + 1e-9
        )


def test_a_key_that_is_written_again_asks_for_its_last_value(probe):
    keys, values, last = probe.trial(4, 2, 8, num_trials=3, seed=0)
    assert keys.shape == values.shape == (3, 6, 8)
    assert torch.equal(keys[:, 4:], keys[:, :2])
    assert last.tolist() == [4, 5, 2, 3]
    # a memory that knows everything, and one that knows the first values only
    assert probe.capacity(lambda k, v, q: v[:, last], 4, 2, width=8) == 1
    assert probe.capacity(lambda k, v, q: v[:, :4], 4, 2, width=8) == 0.5
