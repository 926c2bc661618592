"""Intervals and tests against scipy, brute force and hand computation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cl.metrics import bootstrap_ci, holm, seeds_needed, wilcoxon_signed_rank

checked = settings(derandomize=True, max_examples=60, deadline=None)


def brute_force_wilcoxon(differences):
    """All 2^n sign patterns, one by one."""
    differences = [d for d in differences if d != 0]
    ranks = stats.rankdata(np.abs(differences))
    observed = sum(rank for rank, d in zip(ranks, differences, strict=True) if d > 0)
    sums = np.array([np.dot(ranks, signs) for signs in itertools.product([0, 1], repeat=len(ranks))])
    return min(1.0, 2 * min(np.mean(sums <= observed), np.mean(sums >= observed)))


@checked
@given(st.lists(st.integers(-4, 4).filter(bool), min_size=1, max_size=9))
def test_wilcoxon_with_ties_is_the_enumeration(differences):
    assert wilcoxon_signed_rank(differences) == pytest.approx(brute_force_wilcoxon(differences), abs=1e-12)


@checked
@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=2, max_size=30, unique_by=lambda x: x[0]))
def test_wilcoxon_without_ties_is_scipy(parts):
    differences = [size if is_up else -size for size, is_up in parts]
    assert wilcoxon_signed_rank(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_wilcoxon_is_exact_where_scipy_is_not():
    tied = [0.1, 0.1, 0.1, -0.2, 0.3, 0.3]
    assert wilcoxon_signed_rank(tied) == brute_force_wilcoxon(tied) == 0.25
    assert stats.wilcoxon(tied, method="exact").pvalue != pytest.approx(0.25)


def test_wilcoxon_edges():
    assert math.isnan(wilcoxon_signed_rank([]))
    assert math.isnan(wilcoxon_signed_rank([0.1, math.nan, 0.3]))
    assert wilcoxon_signed_rank([0.0, 0.0]) == 1.0
    assert wilcoxon_signed_rank([0.3]) == 1.0
    assert wilcoxon_signed_rank([0.0, 0.1, 0.2]) == wilcoxon_signed_rank([0.1, 0.2])
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last digit only, and 0.1 + 0.2 - 0.3 is no difference
    noisy = [0.3 - 0.2, -(0.2 - 0.1), 0.1 + 0.2 - 0.3, 0.5]
    assert wilcoxon_signed_rank(noisy) == wilcoxon_signed_rank([1, -1, 5]) == 0.75


@pytest.mark.parametrize(("n", "smallest"), [(5, 0.0625), (6, 0.03125), (8, 0.0078125), (10, 2 / 1024)])
def test_smallest_p_of_n_seeds(n, smallest):
    assert wilcoxon_signed_rank(np.arange(1, n + 1)) == smallest


@pytest.mark.parametrize(("num_comparisons", "needed"), [(1, 6), (2, 7), (6, 8), (9, 9)])
def test_seeds_needed_is_where_holm_first_lets_through(num_comparisons, needed):
    assert seeds_needed(num_comparisons) == needed
    assert 2 / 2**needed * num_comparisons <= 0.05 < 2 / 2 ** (needed - 1) * num_comparisons


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04; the last is lifted to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_holm_does_not_count_comparisons_without_a_test():
    assert holm([0.01, math.nan, 0.04]).tolist() == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = np.random.default_rng(0).uniform(0, 0.2, 12)
    np.testing.assert_allclose(holm(p_values), multitest.multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("values", [[0.13, 0.29, 0.34, 0.47, 0.61], [0.2, 0.21, 0.23, 0.26, 0.9]])
def test_interval_of_few_seeds_is_the_percentile_one(values):
    # 5 values have 5^5 equally likely resamples, so the percentiles of the mean can be listed; skewed, BCa is elsewhere
    means = [np.mean(resample) for resample in itertools.product(values, repeat=5)]
    assert bootstrap_ci(values) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.005)


def test_interval_from_eight_seeds_on_is_bca():
    skewed = [1.0, 1.1, 1.3, 1.2, 1.4, 1.15, 1.25, 5.0]

    def scipy_interval(method):
        rng = np.random.default_rng(5)
        found = stats.bootstrap((skewed,), np.mean, n_resamples=20000, method=method, rng=rng)
        return found.confidence_interval

    assert bootstrap_ci(skewed) == pytest.approx(scipy_interval("BCa"), rel=0.03)
    assert bootstrap_ci(skewed).high > 1.1 * scipy_interval("percentile").high


def test_interval_is_deterministic_and_follows_its_seed():
    values = np.random.default_rng(0).uniform(size=10)
    assert bootstrap_ci(values) == bootstrap_ci(values)
    assert bootstrap_ci(values) != bootstrap_ci(values, seed=1)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan, 0.6]])
def test_no_interval(values):
    assert all(map(math.isnan, bootstrap_ci(values)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [5, 8, 10])
def test_differences_that_are_equal_but_for_rounding_have_an_interval_too(n):
    """From 8 seeds on scipy gave none, and warned: a difference of 0.1 on every seed came without an interval."""
    for seed in range(20):
        lower = np.random.default_rng(seed).uniform(0.1, 0.9, n)
        assert bootstrap_ci((lower + 0.1) - lower) == pytest.approx((0.1, 0.1), abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_equal_runs_have_an_interval_without_width(n):
    assert bootstrap_ci([0.7] * n) == (0.7, 0.7)
