"""Interquartile mean and average ranks: by hand, and against the libraries that publish them."""

import math
import warnings

import numpy as np
import pytest

from cl.metrics import average_ranks, interquartile_mean


def test_iqm_drops_a_quarter_of_the_runs_at_either_end():
    iqm, _ = interquartile_mean({"digits": [0.0, 0.4, 0.5, 0.6], "mnist": [0.3, 0.5, 0.7, 1.0]})
    assert iqm == pytest.approx((0.4 + 0.5 + 0.5 + 0.6) / 4)


def test_iqm_is_rliable():
    rliable = pytest.importorskip("rliable.metrics")
    runs_by_streams = np.random.default_rng(0).uniform(size=(7, 3))
    iqm, _ = interquartile_mean({str(i): column for i, column in enumerate(runs_by_streams.T)})
    assert iqm == pytest.approx(rliable.aggregate_iqm(runs_by_streams))


def test_bootstrap_is_stratified():
    # two streams without spread: resampling inside each changes nothing, resampling the pool would
    iqm, interval = interquartile_mean({"digits": [0.2] * 4, "mnist": [0.8] * 4})
    assert iqm == pytest.approx(0.5)
    assert interval == pytest.approx((0.5, 0.5))


def test_bootstrap_against_a_plain_loop():
    scores = {"digits": [0.1, 0.4, 0.5, 0.9, 0.6], "mnist": [0.3, 0.2, 0.8, 0.7]}
    rng = np.random.default_rng(3)
    resampled = []
    for _ in range(4000):
        pool = np.sort(np.concatenate([rng.choice(values, len(values)) for values in scores.values()]))
        resampled.append(pool[2:-2].mean())
    _, interval = interquartile_mean(scores)
    assert interval == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.02)


@pytest.mark.parametrize(
    ("scores", "bounds"),
    [
        # of two runs a resample is either one twice or both: the mean is 0.2, 0.4 or 0.6
        ({"digits": [0.2, 0.6]}, (0.2, 0.6)),
        ({"digits": [0.5], "mnist": [0.2, 0.6, 0.7]}, (math.nan, math.nan)),
        ({"digits": [0.5, 0.5], "mnist": [0.7, 0.7, 0.7]}, ((0.5 + 0.7 + 0.7) / 3,) * 2),
    ],
    ids=["two runs", "a stream with one run", "streams of unlike length"],
)
def test_interval_of_few_runs(scores, bounds):
    _, interval = interquartile_mean(scores)
    assert interval == pytest.approx(bounds, nan_ok=True)


def test_iqm_interval_is_deterministic_and_follows_its_seed():
    scores = {"digits": np.random.default_rng(0).uniform(size=10)}
    assert interquartile_mean(scores) == interquartile_mean(scores)
    assert interquartile_mean(scores)[1] != interquartile_mean(scores, seed=1)[1]


def test_iqm_edges():
    iqm, interval = interquartile_mean({"digits": [0.5], "mnist": [0.7]})
    assert iqm == pytest.approx(0.6)
    assert all(map(math.isnan, interval))
    assert math.isnan(interquartile_mean({})[0])
    assert math.isnan(interquartile_mean({"digits": [0.5, math.nan]})[0])


def test_ranks_by_hand():
    # the tie for second place on the second stream shares rank 2.5
    ranking = average_ranks({"naive": [0.2, 0.3], "replay": [0.8, 0.3], "joint": [0.9, 0.9]})
    assert ranking.average_rank == {"naive": 2.75, "replay": 2.25, "joint": 1.0}
    losses = average_ranks({"naive": [2.0, 3.0], "joint": [1.0, 1.0]}, higher_is_better=False)
    assert losses.average_rank == {"naive": 2.0, "joint": 1.0}
    assert math.isnan(losses.friedman_p)


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_difference_has_the_constants_of_demsar(k, q):
    scores = {str(i): np.random.default_rng(i).uniform(size=6) for i in range(k)}
    assert average_ranks(scores).critical_difference == pytest.approx(q * math.sqrt(k * (k + 1) / 36), abs=2e-3)


@pytest.mark.filterwarnings("error")
def test_rounding_breaks_no_tie():
    scores = {"a": [0.1 + 0.2, 0.5], "b": [0.3, 0.5], "c": [0.3, 0.5]}
    ranking = average_ranks(scores)
    assert ranking.average_rank == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert math.isnan(ranking.friedman_p)


def test_ranks_are_autorank():
    autorank = pytest.importorskip("autorank")
    pandas = pytest.importorskip("pandas")
    scores = {f"s{i}": np.random.default_rng(i).uniform(size=12) + 0.1 * i for i in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = autorank.autorank(pandas.DataFrame(scores), force_mode="nonparametric", order="descending")
    ours = average_ranks(scores)
    assert ours.average_rank == pytest.approx(theirs.rankdf["meanrank"].to_dict())
    assert ours.critical_difference == pytest.approx(theirs.cd, abs=1e-3)
    assert ours.friedman_p == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize(
    "scores", [{}, {"a": [0.1]}, {"a": [0.1, 0.2], "b": [0.1]}, {"a": [0.1, math.nan], "b": [0.1, 0.2]}]
)
def test_ranks_need_a_full_table(scores):
    with pytest.raises(ValueError, match="at least two strategies with one score on every stream"):
        average_ranks(scores)
