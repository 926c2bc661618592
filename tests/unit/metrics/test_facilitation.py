"""Steps until an experience is learnt, by hand."""

import math

import pytest

from cl.metrics import EvalTable, forward_facilitation, steps_to_reach
from cl.metrics.facilitation import period_of

# evaluated every 10 steps; experiences of 40 steps; experience 3 teaches domain 0 again
COURSES = [
    *[(0, step, 0, value) for step, value in ((10, 0.3), (20, 0.6), (30, 0.8))],
    *[(1, step, 1, value) for step, value in ((50, 0.6), (60, 0.85), (70, 0.8))],
    *[(1, step, 0, 0.9) for step in (50, 60, 70)],
    *[(2, step, 2, value) for step, value in ((90, 0.5), (100, 0.7), (110, 0.75))],
    *[(3, step, 0, 0.9) for step in (130, 140, 150)],
]
R = [[0.9, 0.1, 0.1], [0.7, 0.9, 0.1], [0.6, 0.7, 0.9], [0.9, 0.6, 0.6]]
TABLE = EvalTable.from_rows(R, trained=[0, 1, 2, 0], within=COURSES)


def test_steps_from_the_start_of_each_experience():
    # the third gets there at its end only, which is at least one step after its last evaluation; a revisit is not new
    assert steps_to_reach(TABLE, 0.8) == {0: 30.0, 1: 20.0, 2: 31.0}
    assert steps_to_reach(TABLE, 0.6) == {0: 20.0, 1: 10.0, 2: 20.0}
    assert steps_to_reach(TABLE, 0.95)[2] == math.inf


def test_facilitation_compares_with_the_first():
    assert forward_facilitation(TABLE, 0.8) == pytest.approx(30 / ((20 + 31) / 2))
    assert forward_facilitation(TABLE, 0.6) == pytest.approx(20 / ((10 + 20) / 2))


def test_never_learnt():
    low = [[0.9, 0.1], [0.9, 0.5]]
    table = EvalTable.from_rows(low, within=[(0, 10, 0, 0.9), (1, 30, 1, 0.4)])
    assert forward_facilitation(table, 0.8) == 0.0
    assert math.isnan(forward_facilitation(table, 0.95))


def test_undefined_without_evaluations_inside():
    assert steps_to_reach(EvalTable.from_rows(R, trained=[0, 1, 2, 0])) == {}
    assert math.isnan(forward_facilitation(EvalTable.from_rows(R, trained=[0, 1, 2, 0])))
    only_first = EvalTable.from_rows(R, trained=[0, 1, 2, 0], within=COURSES[:3])
    assert math.isnan(forward_facilitation(only_first))


def test_one_evaluation_in_each_experience():
    """The second is at 0.8 when asked, the third when it ends; without the first, nobody knows when they began."""
    once = [(0, 25, 0, 0.9), (1, 65, 1, 0.8), (2, 105, 2, 0.5)]
    assert steps_to_reach(EvalTable.from_rows(R[:3], within=once), 0.8) == {0: 25.0, 1: 25.0, 2: 26.0}
    unknown = EvalTable.from_rows(R[:3], within=once[1:])
    assert steps_to_reach(unknown, 0.8) == {}
    assert math.isnan(forward_facilitation(unknown, 0.8))


@pytest.mark.parametrize(
    ("within", "period"),
    [
        # the first experience was shorter than the time between two evaluations
        ([(1, 40, 1, 0.5), (1, 50, 1, 0.6), (1, 70, 1, 0.7), (2, 80, 2, 0.5)], 10),
        ([(1, 40, 1, 0.5), (2, 80, 2, 0.5)], 0),
        ([], 0),
    ],
)
def test_the_period_where_the_first_experience_does_not_say_it(within, period):
    table = EvalTable.from_rows(R[:3], within=within)
    assert period_of(table) == period
    assert steps_to_reach(table, 0.5) == ({1: 10.0, 2: 10.0} if period else {})
    assert math.isnan(forward_facilitation(table, 0.5))
    assert period_of(table.upto(0)) == 0


def test_the_first_must_have_learnt_it_for_others_to_be_compared():
    table = EvalTable.from_rows([[0.5, 0.1], [0.5, 0.9]], within=[(0, 10, 0, 0.4), (1, 30, 1, 0.9)])
    assert steps_to_reach(table, 0.8) == {0: math.inf, 1: 10.0}
    assert math.isnan(forward_facilitation(table, 0.8))


def test_an_experience_that_teaches_several_has_no_domain_of_its_own():
    table = EvalTable.from_rows(R[:2], trained=[0, -1], practises=[[0], [1, 2]], within=COURSES[:9])
    assert steps_to_reach(table, 0.8) == {0: 30.0}


def test_losses_are_reached_from_above():
    table = EvalTable.from_rows(
        [[1.0, 4.0], [2.0, 1.0]], measure="loss", within=[(0, 5, 0, 3.0), (0, 10, 0, 2.0), (1, 20, 1, 1.5)]
    )
    assert steps_to_reach(table, 2.0) == {0: 10.0, 1: 5.0}
    assert math.isnan(forward_facilitation(table))
