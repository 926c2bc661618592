"""Strategies over shared seeds: pairing, Holm over the rivals, and what the sentence says."""

import math

import numpy as np
import pytest

from cl.metrics import bootstrap_ci, compare, wilcoxon_signed_rank

RNG = np.random.default_rng(0)
NAIVE = {seed: float(value) for seed, value in enumerate(RNG.uniform(0.15, 0.25, 10))}


def shifted(by, seeds=range(10)):
    return {seed: NAIVE[seed] + by * (1 + seed / 100) for seed in seeds}


def test_description_of_each_strategy():
    (row,) = compare({"naive": {0: 0.2, 1: 0.4, 2: 0.6}})
    assert (row.num_seeds, row.mean, row.sd) == (3, pytest.approx(0.4), pytest.approx(0.2))
    assert (row.ci_low, row.ci_high) == bootstrap_ci([0.2, 0.4, 0.6])
    assert row.verdict == ""
    assert math.isnan(row.difference)


@pytest.mark.parametrize(("values", "sd"), [([0.5], math.nan), ([0.2, 0.6], 0.4 / math.sqrt(2)), ([0.5, 0.5], 0.0)])
def test_spread_of_few_runs(values, sd):
    (row,) = compare({"naive": dict(enumerate(values))})
    assert row.sd == pytest.approx(sd, nan_ok=True)


def test_ten_seeds_three_rivals():
    noise = {seed: value + (0.01 if seed % 2 else -0.0101) for seed, value in NAIVE.items()}
    rows = compare({"replay": shifted(0.5), "naive": NAIVE, "noise": noise, "worse": shifted(-0.1)}, "naive")
    assert [row.strategy for row in rows] == ["replay", "naive", "noise", "worse"]
    replay, naive, noisy, worse = rows
    assert replay.p_value == worse.p_value == 2 / 1024
    assert replay.p_holm == worse.p_holm == pytest.approx(3 * 2 / 1024)
    assert noisy.p_holm == noisy.p_value > 0.05
    assert replay.num_pairs == 10
    assert replay.difference == pytest.approx(0.5 * 1.045)
    differences = np.array([shifted(0.5)[seed] - NAIVE[seed] for seed in range(10)])
    assert (replay.difference_low, replay.difference_high) == bootstrap_ci(differences)
    assert replay.verdict == "higher than naive by 0.5225, significant (Holm p = 0.00586)"
    assert worse.verdict == "lower than naive by 0.1045, significant (Holm p = 0.00586)"
    assert "not significant (Holm p = " in noisy.verdict
    assert (naive.num_pairs, naive.verdict) == (0, "")
    assert math.isnan(naive.p_value)


def test_pairing_ignores_the_spread_between_seeds():
    spread = {seed: seed / 10 for seed in range(10)}
    better = {seed: value + 0.01 + seed / 1e4 for seed, value in spread.items()}
    _, row = compare({"naive": spread, "replay": better}, "naive")
    assert row.ci_low < row.mean - 0.1
    assert 0.01 <= row.difference_low <= row.difference_high <= 0.011


def test_missing_runs_and_undefined_values_leave_the_pairing_and_are_reported():
    values = {"naive": NAIVE, "replay": {**shifted(0.5, range(7)), 3: math.nan, 40: 0.9}}
    _, row = compare(values, "naive")
    assert row.num_seeds == 7
    assert row.num_pairs == 6
    assert row.unpaired_seeds == (3, 7, 8, 9, 40)
    assert row.p_value == 2 / 64


def test_too_few_seeds_are_said_not_to_suffice():
    _, row = compare({"naive": NAIVE, "replay": shifted(0.5, range(5))}, "naive")
    assert row.p_value == row.p_holm == 0.0625
    assert row.verdict == (
        "higher than naive by 0.51; 5 differing pairs cannot reach significance (Holm p is at least 0.0625), 6 can"
    )


def test_holm_raises_the_number_of_seeds_needed():
    rivals = {f"rival{i}": shifted(0.1 * (i + 1), range(7)) for i in range(6)}
    rows = compare({"naive": NAIVE, **rivals}, "naive")[1:]
    for row in rows:
        assert row.p_holm == pytest.approx(6 * 2 / 128)
        assert "7 differing pairs cannot reach significance (Holm p is at least 0.0938), 8 can" in row.verdict


def test_a_rival_with_few_seeds_does_not_silence_one_with_many():
    rows = compare({"naive": NAIVE, "short": shifted(0.5, range(3)), "long": shifted(0.5)}, "naive")
    assert "3 differing pairs cannot reach significance" in rows[1].verdict
    assert "significant (Holm p = 0.00391)" in rows[2].verdict


def test_equal_runs_do_not_count_as_evidence():
    rows = compare({"naive": NAIVE, "same": dict(NAIVE), "nearly": {**NAIVE, 0: NAIVE[0] + 0.1}}, "naive")
    assert rows[1].p_value == 1.0
    assert rows[1].verdict == "equal to naive on every shared seed"
    assert "1 differing pairs cannot reach significance (Holm p is at least 1), 7 can" in rows[2].verdict


@pytest.mark.parametrize("own", [[0.5, 0.25], [0.4, 0.6, 0.6]])
def test_differences_that_add_up_to_nothing_are_neither_higher_nor_lower(own):
    """Once `lower than naive by 0`, or `higher` by what rounding left."""
    naive = [0.25, 0.5] if len(own) == 2 else [0.3, 0.4, 0.9]
    _, row = compare({"naive": dict(enumerate(naive)), "swapped": dict(enumerate(own))}, "naive")
    assert row.verdict.startswith(f"on average equal to naive; {len(own)} differing pairs cannot reach significance")


def test_nothing_to_compare():
    rows = compare({"naive": {0: 0.2}, "replay": {1: 0.9}, "gone": {}}, "naive")
    assert [row.verdict for row in rows] == ["", "no seed in common with naive", "no seed in common with naive"]
    assert math.isnan(rows[0].sd)
    assert math.isnan(rows[0].ci_low)
    assert math.isnan(rows[2].mean)
    assert math.isnan(rows[1].p_holm)


def test_a_comparison_without_shared_seeds_does_not_count_in_holm():
    rows = compare({"naive": NAIVE, "replay": shifted(0.5), "elsewhere": {99: 0.3}}, "naive")
    assert rows[1].p_holm == rows[1].p_value == wilcoxon_signed_rank(np.ones(10))


def test_unknown_reference():
    with pytest.raises(ValueError, match="reference 'joint' is not among the strategies naive"):
        compare({"naive": NAIVE}, "joint")
