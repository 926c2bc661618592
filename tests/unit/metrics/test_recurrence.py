"""Domains that come back: every metric by hand, the retention curve, and the law that is fitted to it."""

import math

import numpy as np
import pytest

from cl import metrics
from cl.metrics import EvalTable, fit_power_law, revisit_curve, summary

# four experiences on three classes, two at a time; nobody teaches a single class
SCOLE = EvalTable.from_rows(
    [[0.8, 0.6, 0.1], [0.4, 0.9, 0.7], [0.7, 0.5, 0.9], [0.5, 0.8, 0.6]],
    R_init=[0.1, 0.1, 0.1],
    trained=[-1, -1, -1, -1],
    practises=[[0, 1], [1, 2], [0, 2], [1, 2]],
)
# three tasks taught in turn, older ones rehearsed beside the new one
REHEARSED = EvalTable.from_rows(
    [[0.9, 0.2, 0.1], [0.8, 0.9, 0.2], [0.7, 0.85, 0.9]],
    R_init=[0.1, 0.1, 0.1],
    practises=[[0], [0, 1], [1, 2]],
)


def test_several_domains_at_once():
    assert SCOLE.first_visit.tolist() == [0, 0, 1]
    assert SCOLE.taught.tolist() == SCOLE.practised.tolist()
    assert SCOLE.recurs
    assert SCOLE.earlier.all()
    assert SCOLE.learned.tolist() == [0.8, 0.6, 0.7]
    found = summary(SCOLE)
    assert found["final"] == pytest.approx((0.5 + 0.8 + 0.6) / 3)
    assert found["average"] == pytest.approx(np.mean([0.7, 2.0 / 3, 2.1 / 3, 1.9 / 3]))
    assert found["learning"] == pytest.approx(2.1 / 3)
    assert found["bwt"] == pytest.approx((-0.3 + 0.2 - 0.1) / 3)
    assert found["fwt"] == pytest.approx(0.0)
    assert found["forgetting_first"] == pytest.approx((0.3 - 0.2 + 0.1) / 3)
    assert found["forgetting_max"] == pytest.approx((0.3 + 0.1 + 0.3) / 3)


def test_what_is_taught_is_no_bystander():
    """In the last experience classes 1 and 2 are current, so only class 0 can have fallen aside."""
    courses = [(1, 30, 0, 0.3), (2, 50, 1, 0.5), (3, 70, 0, 0.2), (3, 70, 1, 0.0), (3, 70, 2, 0.0)]
    table = EvalTable.from_rows(SCOLE.R, trained=[-1] * 4, practises=SCOLE.practises, within=courses)
    assert metrics.min_acc(table) == pytest.approx(0.2)
    assert metrics.stability_gap(table) == pytest.approx((0.8 - 0.3 + 0.9 - 0.5 + 0.7 - 0.2) / 3)
    assert metrics.recovery(table) == pytest.approx((0.4 - 0.3 + 0.5 - 0.5 + 0.5 - 0.2) / 3)
    assert metrics.wc_acc(table) == pytest.approx((0.8 + 0.6 + 0.2) / 3)


def test_what_is_rehearsed_is_still_a_bystander():
    """Schedules are compared by it: a task seen again in passing must not leave the worst case."""
    table = EvalTable.from_rows(REHEARSED.R, practises=REHEARSED.practises, within=[(2, 9, 0, 0.5), (2, 9, 1, 0.3)])
    assert table.taught.tolist() == np.eye(3, dtype=bool).tolist()
    assert table.practised.tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    assert metrics.min_acc(table) == pytest.approx((0.5 + 0.3) / 2)
    assert metrics.wc_acc(table) == pytest.approx((0.9 + 0.5 + 0.3) / 3)


def test_rows_of_a_later_domain_are_no_visit():
    """Blurred boundaries: a few rows of domain 1 come early, but it is learnt where it is taught."""
    table = EvalTable.from_rows([[0.9, 0.3], [0.6, 0.8]], practises=[[0, 1], [0, 1]])
    assert table.first_visit.tolist() == [0, 1]
    assert metrics.learning(table) == pytest.approx(0.85)
    assert metrics.bwt(table) == pytest.approx(-0.3)
    assert revisit_curve(table).lag.tolist() == [0]


def test_rehearsal_changes_no_metric_of_first_visits():
    plain = EvalTable.from_rows(REHEARSED.R, REHEARSED.R_init)
    without = {"retention_exponent"}
    for key, value in summary(plain).items():
        assert key in without or summary(REHEARSED)[key] == pytest.approx(value, nan_ok=True), key


def test_lags_count_from_the_last_practice():
    lags = revisit_curve(REHEARSED)
    # lag 0: every practised cell; lag 1: task 0 after the last experience
    assert lags.lag.tolist() == [0, 1]
    assert lags.num_pairs.tolist() == [5, 1]
    assert lags.value == pytest.approx([(0.9 + 0.8 + 0.9 + 0.85 + 0.9) / 5, 0.7])
    # by visits, which rehearsal is not, both older tasks have aged
    assert metrics.forgetting_by_lag(REHEARSED) == pytest.approx({1: (0.1 + 0.05) / 2, 2: 0.2})


def test_lags_of_several_domains_at_once():
    found = revisit_curve(SCOLE)
    assert found.lag.tolist() == [0, 1]
    assert found.num_pairs.tolist() == [8, 3]
    assert found.value[1] == pytest.approx((0.4 + 0.5 + 0.5) / 3)
    assert metrics.forgetting_by_lag(SCOLE) == pytest.approx({1: (0.4 + 0.4 + 0.2) / 3})


def test_cells_that_were_not_evaluated_are_left_out():
    table = EvalTable.from_rows([[0.9, None], [None, 0.8], [0.5, None]], trained=[0, 1, 1])
    found = revisit_curve(table)
    assert (found.lag.tolist(), found.num_pairs.tolist()) == ([0, 2], [2, 1])
    assert found.value == pytest.approx([0.85, 0.5])
    nothing = revisit_curve(EvalTable.from_rows([[0.9]]).upto(0))
    assert nothing.lag.size == nothing.value.size == 0


def test_the_law_is_found_again():
    lag = np.arange(1, 40)
    law = fit_power_law(lag, 0.7 * lag**-0.35, weight=lag)
    assert (law.scale, law.exponent, law.r2) == pytest.approx((0.7, 0.35, 1.0))
    assert law.at([1, 4]) == pytest.approx([0.7, 0.7 * 4**-0.35])


def test_the_fit_is_the_weighted_regression_of_numpy():
    draw = np.random.default_rng(0)
    lag, weight = np.arange(1, 30), draw.integers(1, 50, 29)
    value = 0.8 * lag**-0.4 * np.exp(draw.normal(0, 0.2, 29))
    slope, intercept = np.polyfit(np.log(lag), np.log(value), 1, w=np.sqrt(weight))
    law = fit_power_law(lag, value, weight)
    assert (law.exponent, law.scale) == pytest.approx((-slope, math.exp(intercept)))
    left = np.log(value) - np.polyval([slope, intercept], np.log(lag))
    spread = np.log(value) - np.average(np.log(value), weights=weight)
    assert law.r2 == pytest.approx(1 - np.average(left**2, weights=weight) / np.average(spread**2, weights=weight))


def test_the_law_needs_three_lags_with_a_logarithm():
    assert not fit_power_law([1, 1, 2, 2], [0.9, 0.8, 0.5, 0.4]).is_defined
    assert not fit_power_law([0, 1, 2], [0.9, 0.5, 0.4]).is_defined
    assert not fit_power_law([1, 2, 3], [0.9, 0.5, 0.0]).is_defined
    assert not fit_power_law([1, 2, 3], [0.9, 0.5, 0.4], weight=[1, 1, 0]).is_defined


@pytest.mark.parametrize("num_lags", [3, 4, 5, 30])
def test_a_level_line_is_explained_fully(num_lags):
    """Its R² was 0 wherever the mean of equal logarithms was off in the last digit, for three levels in ten."""
    for value in np.linspace(0.05, 1.0, 200):
        law = fit_power_law(np.arange(num_lags) + 1, [value] * num_lags)
        assert (law.scale, law.exponent, law.r2) == pytest.approx((value, 0.0, 1.0)), value


def test_the_exponent_is_that_of_streams_that_come_back():
    straight = EvalTable.from_rows(np.linspace(0.9, 0.1, 25).reshape(5, 5))
    assert math.isnan(summary(straight)["retention_exponent"])
    forgets = [[0.9 if i % 6 == 0 else 0.8 * (i % 6) ** -0.5, None] for i in range(12)]
    table = EvalTable.from_rows(forgets, trained=[0 if i % 6 == 0 else -1 for i in range(12)])
    assert summary(table)["retention_exponent"] == pytest.approx(0.5)
    forgets = [[1.0 if i % 6 == 0 else 1.2 * (i % 6) ** 0.5, None] for i in range(12)]
    table = EvalTable.from_rows(forgets, trained=[0 if i % 6 == 0 else -1 for i in range(12)], measure="loss")
    assert summary(table)["retention_exponent"] == pytest.approx(0.5), "a loss that rises is forgetting too"


def test_late_average_is_a_window():
    R = [[0.0, 0.0]] * 8 + [[0.5, 0.25], [1.0, 0.25]]
    table = EvalTable.from_rows(R, trained=[0, 1] * 5)
    assert metrics.late_average(table) == pytest.approx(0.5)
    assert metrics.late_average(table.upto(9)) == pytest.approx((0.0 + 0.375) / 2)
    assert metrics.late_average(table.upto(5)) == metrics.final(table.upto(5))
    assert math.isnan(metrics.late_average(table.upto(0)))


def test_practises_survives_files_and_cuts():
    again = EvalTable.from_result(SCOLE.to_result())
    assert again.practised.tolist() == SCOLE.practised.tolist()
    assert SCOLE.upto(2).practises == ((0, 1), (1, 2))
    stopped = SCOLE.to_result() | {"R": SCOLE.R[:2].tolist()}
    assert EvalTable.from_result(stopped).practises == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("practises", "sentence"),
    [([[0]], "practises has 1 entries; expected 2"), ([[0], [2]], "practises points at domain 2; there are 2")],
)
def test_practises_must_fit(practises, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvalTable.from_rows([[0.9, 0.1], [0.8, 0.7]], practises=practises)
