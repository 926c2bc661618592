"""Worst cases inside experiences, by hand."""

import math

import pytest

from cl.metrics import EvalTable, min_acc, recovery, stability_gap, wc_acc

ROWS = [[0.9, 0.1, 0.1], [0.8, 0.7, 0.1], [0.6, 0.5, 0.95]]
WITHIN = [
    (0, 5, 0, 0.2),  # while domain 0 is still being learned: no worst case of the past
    (1, 15, 0, 0.4),
    (1, 15, 1, 0.3),
    (2, 25, 0, 0.55),
    (2, 25, 1, 0.65),
]


def test_three_experiences():
    table = EvalTable.from_rows(ROWS, within=WITHIN)
    # domain 0 falls to 0.4 in experience 1; domain 1 is lowest at the end of experience 2
    assert min_acc(table) == pytest.approx((0.4 + 0.5) / 2)
    assert wc_acc(table) == pytest.approx(0.95 / 3 + (2 / 3) * 0.45)
    # domain 0 in experiences 1 and 2, domain 1 in experience 2
    assert stability_gap(table) == pytest.approx(((0.9 - 0.4) + (0.8 - 0.55) + (0.7 - 0.5)) / 3)
    assert recovery(table) == pytest.approx(((0.8 - 0.4) + (0.6 - 0.55) + 0.0) / 3)


def test_losses_fall_upwards():
    table = EvalTable.from_rows([[2.0, 4.0], [2.5, 1.0]], within=[(1, 10, 0, 3.0)], measure="loss")
    assert min_acc(table) == 3.0
    assert wc_acc(table) == (1.0 + 3.0) / 2
    assert stability_gap(table) == 3.0 - 2.0
    assert recovery(table) == 3.0 - 2.5


def test_a_revisited_domain_counts_as_the_current_one():
    table = EvalTable.from_rows(
        [[0.9, 0.1], [0.5, 0.8], [0.85, 0.6]],
        trained=[0, 1, 0],
        within=[(1, 15, 0, 0.3), (2, 25, 0, 0.7), (2, 25, 1, 0.4)],
    )
    assert min_acc(table) == pytest.approx(0.4)
    assert wc_acc(table) == pytest.approx((0.85 + 0.4) / 2)
    # domain 0 in experience 1, domain 1 in experience 2; domain 0 is taught in 2
    assert stability_gap(table) == pytest.approx(((0.9 - 0.3) + (0.8 - 0.4)) / 2)
    assert recovery(table) == pytest.approx(((0.5 - 0.3) + (0.6 - 0.4)) / 2)


def test_without_evaluations_inside_experiences_nothing_is_claimed():
    table = EvalTable.from_rows(ROWS)
    for metric in (min_acc, wc_acc, stability_gap, recovery):
        assert math.isnan(metric(table))


def test_one_experience_without_such_evaluations_leaves_no_gap():
    table = EvalTable.from_rows(ROWS, within=[point for point in WITHIN if point[0] == 1])
    assert math.isnan(stability_gap(table))
    assert math.isnan(min_acc(table))


def test_first_experience():
    table = EvalTable.from_rows([[0.9]], within=[(0, 5, 0, 0.2)])
    assert wc_acc(table) == 0.9
    for metric in (min_acc, stability_gap, recovery):
        assert math.isnan(metric(table))


def test_an_experience_that_teaches_no_single_domain_has_no_current_one():
    table = EvalTable.from_rows([[0.9], [0.8]], trained=[0, None], within=[(1, 15, 0, 0.4)])
    assert math.isnan(wc_acc(table))
    assert min_acc(table) == 0.4
