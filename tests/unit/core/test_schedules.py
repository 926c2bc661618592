"""Learning-rate factors: range, ends, warm-up; numbers by hand are in the doctests."""

import pytest

from cl.schedules import constant, cosine, linear

SCHEDULES = [constant, linear, cosine]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_frac", [0.0, 0.1, 1.0])
def test_factors_stay_in_the_unit_interval(schedule, total, warmup_frac):
    for step in range(total + 3):
        assert 0.0 <= schedule(step, total, warmup_frac=warmup_frac) <= 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_to_one_and_no_step_is_lost_at_rate_zero(schedule):
    ramp = [schedule(step, 20, warmup_frac=0.25) for step in range(5)]
    assert ramp == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(5, 20, warmup_frac=0.25) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_ends_at_the_final_factor_and_stays_there(schedule):
    assert schedule(0, 10, final=0.1) == 1.0
    assert schedule(10, 10, final=0.1) == pytest.approx(0.1)
    assert schedule(50, 10, final=0.1) == pytest.approx(0.1)


def test_cosine_is_slow_at_both_ends():
    values = [cosine(step, 4) for step in range(5)]
    assert values == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])
