"""Every metric of R against numbers worked out by hand (the working stands beside the expectation)."""

import math

import pytest

from cl.metrics import (
    EvalTable,
    aufc,
    average,
    bwt,
    diaz_rodriguez,
    final,
    forgetting_by_lag,
    forgetting_first,
    forgetting_max,
    forgetting_max_by_domain,
    fwt,
    intransigence,
    learning,
    seen_average,
)

ONE = EvalTable.from_rows([[0.9]], R_init=[0.1])
TWO = EvalTable.from_rows([[0.9, 0.3], [0.6, 0.8]], R_init=[0.1, 0.2])
# domain 0 peaks after experience 1, domain 1 improves after it was learned
THREE = EvalTable.from_rows(
    [[0.80, 0.20, 0.10], [0.90, 0.70, 0.30], [0.60, 0.75, 0.95]],
    R_init=[0.10, 0.10, 0.15],
)
REVISIT = EvalTable.from_rows([[0.9, 0.3], [0.5, 0.8], [0.85, 0.6]], R_init=[0.1, 0.2], trained=[0, 1, 0])
LOSS = EvalTable.from_rows(
    [[2.0, 3.5, 3.0], [2.6, 1.5, 2.8], [2.4, 1.9, 1.0]],
    R_init=[4.0, 3.0, 3.1],
    measure="loss",
)


@pytest.mark.parametrize(
    ("table", "metric", "expected"),
    [
        (ONE, final, 0.9),
        (ONE, average, 0.9),
        (ONE, learning, 0.9),
        (TWO, final, (0.6 + 0.8) / 2),
        (TWO, average, (0.9 + (0.6 + 0.8) / 2) / 2),
        (TWO, learning, (0.9 + 0.8) / 2),
        (TWO, bwt, 0.6 - 0.9),
        (TWO, fwt, 0.3 - 0.2),
        (TWO, forgetting_max, 0.9 - 0.6),
        (TWO, forgetting_first, 0.9 - 0.6),
        # the curve runs from 0 to 0.3 over one experience
        (TWO, aufc, 0.15),
        (THREE, final, (0.60 + 0.75 + 0.95) / 3),
        (THREE, average, (0.80 + (0.90 + 0.70) / 2 + (0.60 + 0.75 + 0.95) / 3) / 3),
        (THREE, learning, (0.80 + 0.70 + 0.95) / 3),
        (THREE, bwt, ((0.60 - 0.80) + (0.75 - 0.70)) / 2),
        (THREE, fwt, ((0.20 - 0.10) + (0.30 - 0.15)) / 2),
        (THREE, forgetting_max, ((0.90 - 0.60) + (0.70 - 0.75)) / 2),
        (THREE, forgetting_first, ((0.80 - 0.60) + (0.70 - 0.75)) / 2),
        # domain 0: 0, -0.1, 0.2 over two experiences; domain 1: 0, -0.05 over one
        (THREE, aufc, ((-0.05 + 0.05) / 2 + -0.025) / 2),
        # both domains were first visited before the last experience
        (REVISIT, final, (0.85 + 0.6) / 2),
        (REVISIT, average, (0.9 + (0.5 + 0.8) / 2 + (0.85 + 0.6) / 2) / 3),
        (REVISIT, learning, (0.9 + 0.8) / 2),
        (REVISIT, bwt, ((0.85 - 0.9) + (0.6 - 0.8)) / 2),
        (REVISIT, fwt, 0.3 - 0.2),
        (REVISIT, forgetting_max, ((0.9 - 0.85) + (0.8 - 0.6)) / 2),
        # domain 0: 0, 0.4, 0.05 over two experiences; domain 1: 0, 0.2 over one
        (REVISIT, aufc, ((0.2 + 0.225) / 2 + 0.1) / 2),
        # nats: every positive difference means worse
        (LOSS, final, (2.4 + 1.9 + 1.0) / 3),
        (LOSS, average, (2.0 + (2.6 + 1.5) / 2 + (2.4 + 1.9 + 1.0) / 3) / 3),
        (LOSS, learning, (2.0 + 1.5 + 1.0) / 3),
        (LOSS, bwt, ((2.4 - 2.0) + (1.9 - 1.5)) / 2),
        (LOSS, fwt, ((3.5 - 3.0) + (2.8 - 3.1)) / 2),
        (LOSS, forgetting_max, ((2.4 - 2.0) + (1.9 - 1.5)) / 2),
        (LOSS, forgetting_first, ((2.4 - 2.0) + (1.9 - 1.5)) / 2),
        # domain 0: 0, 0.6, 0.4 over two experiences; domain 1: 0, 0.4 over one
        (LOSS, aufc, ((0.3 + 0.5) / 2 + 0.2) / 2),
    ],
)
def test_by_hand(table, metric, expected):
    assert metric(table) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [bwt, fwt, forgetting_max, forgetting_first, aufc])
def test_one_experience_has_no_past_and_says_so(metric):
    assert math.isnan(metric(ONE))


@pytest.mark.parametrize(
    ("R", "defined"),
    [
        # only seen domains were evaluated: nothing but FWT needs the rest
        ([[0.9, None], [0.6, 0.8]], {final, average, learning, bwt, forgetting_max, forgetting_first, aufc}),
        # the diagonal is missing
        ([[None, 0.3], [0.6, 0.8]], {final, fwt}),
        # the last row lacks the old domain
        ([[0.9, 0.3], [None, 0.8]], {learning, fwt}),
        # the last row lacks the new domain
        ([[0.9, 0.3], [0.6, None]], {bwt, fwt, forgetting_max, forgetting_first, aufc}),
    ],
)
def test_a_missing_cell_is_nan_for_those_who_need_it_and_for_nobody_else(R, defined):
    table = EvalTable.from_rows(R, R_init=[0.1, 0.2])
    metrics = {final, average, learning, bwt, fwt, forgetting_max, forgetting_first, aufc}
    assert {metric for metric in metrics if not math.isnan(metric(table))} == defined


def test_best_earlier_value_is_taken_over_the_evaluated_cells():
    table = EvalTable.from_rows([[0.9, None, None], [None, 0.8, None], [0.7, 0.7, 0.9]])
    assert forgetting_max(table) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.7)) / 2)


def test_fwt_needs_an_evaluation_before_training_and_trained_heads():
    assert math.isnan(fwt(EvalTable.from_rows([[0.9, 0.3], [0.6, 0.8]])))
    assert math.isnan(fwt(TWO.mask_untrained()))
    assert bwt(TWO.mask_untrained()) == bwt(TWO)


def test_fwt_of_a_revisited_stream_uses_the_row_before_the_first_visit():
    rows = [[0.9, 0.3, 0.2], [0.8, 0.4, 0.5], [0.7, 0.9, 0.6], [0.6, 0.8, 0.9]]
    table = EvalTable.from_rows(rows, R_init=[0.1, 0.1, 0.1], trained=[0, 0, 1, 2])
    assert fwt(table) == pytest.approx(((0.4 - 0.1) + (0.6 - 0.1)) / 2)


def test_a_held_out_domain_counts_in_the_final_row_only():
    table = EvalTable.from_rows([[0.9, 0.3, 0.5], [0.6, 0.8, 0.2]], trained=[0, 1])
    assert final(table) == pytest.approx((0.6 + 0.8 + 0.2) / 3)
    assert average(table) == average(TWO)
    assert bwt(table) == bwt(TWO)
    assert learning(table) == learning(TWO)


def test_a_run_that_teaches_no_single_domain_has_averages_and_no_forgetting():
    scole = EvalTable.from_rows([[0.2, 0.4], [0.5, 0.5]], trained=[None, None])
    assert seen_average(scole).tolist() == pytest.approx([0.3, 0.5])
    assert average(scole) == pytest.approx(0.4)
    for metric in (learning, bwt, forgetting_max, forgetting_first, aufc):
        assert math.isnan(metric(scole))


def test_micro_average_weighs_by_test_size():
    assert final(TWO, num_samples=[100, 300]) == pytest.approx(0.25 * 0.6 + 0.75 * 0.8)


def test_loss_before_training_counts_as_an_earlier_value_and_accuracy_does_not():
    pretrained = EvalTable.from_rows([[2.5, 4.0], [3.0, 2.0]], R_init=[2.0, 4.0], measure="loss")
    assert forgetting_max(pretrained) == 3.0 - 2.0
    assert forgetting_first(pretrained) == 3.0 - 2.5
    lucky = EvalTable.from_rows([[0.5, 0.1], [0.4, 0.9]], R_init=[0.8, 0.1])
    assert forgetting_max(lucky) == pytest.approx(0.5 - 0.4)


def test_forgetting_by_domain_marks_the_current_one():
    assert forgetting_max_by_domain(THREE).tolist() == pytest.approx([0.3, -0.05, math.nan], nan_ok=True)


def test_intransigence_is_positive_when_worse_than_the_reference():
    assert intransigence(TWO, [0.95, 0.95]) == pytest.approx(((0.95 - 0.9) + (0.95 - 0.8)) / 2)
    assert intransigence(LOSS, [1.8, 1.4, 0.9]) == pytest.approx((0.2 + 0.1 + 0.1) / 3)


def test_aufc_on_an_uneven_axis():
    # domain 0: 0, -0.1, 0.2 at 100, 200, 400; domain 1: 0, -0.05 at 200, 400
    domain_0 = (100 * -0.05 + 200 * 0.05) / 300
    assert aufc(THREE, positions=[100, 200, 400]) == pytest.approx((domain_0 - 0.025) / 2)


@pytest.mark.parametrize("positions", [[1, 2], [1, 1, 2], [3, 2, 1]])
def test_aufc_refuses_positions_that_do_not_fit(positions):
    with pytest.raises(ValueError, match="positions must be 3 increasing numbers"):
        aufc(THREE, positions)


def test_forgetting_against_the_lag_since_the_last_visit():
    rows = [[0.9, 0.3], [0.5, 0.8], [0.85, 0.6], [0.8, 0.4]]
    table = EvalTable.from_rows(rows, trained=[0, 1, 0, None])
    # lag 1: domain 0 after 1 (0.4), domain 1 after 2 (0.2), domain 0 after 3 (0.05); lag 2: domain 1 after 3 (0.4)
    assert forgetting_by_lag(table) == pytest.approx({1: (0.4 + 0.2 + 0.05) / 3, 2: 0.4})
    sparse = EvalTable.from_rows([[0.9, None], [None, 0.8], [0.7, None]], trained=[0, 1, None])
    assert forgetting_by_lag(sparse) == pytest.approx({2: 0.2})


def test_diaz_rodriguez_by_hand():
    # below the diagonal: 0.9 - 0.8, 0.6 - 0.8, 0.75 - 0.7
    backward = (0.1 - 0.2 + 0.05) / 3
    assert diaz_rodriguez(THREE) == pytest.approx(
        {
            "accuracy": (0.80 + 0.90 + 0.70 + 0.60 + 0.75 + 0.95) / 6,
            "bwt": backward,
            "bwt_plus": 0.0,
            "rem": 1 + backward,
            "fwt": (0.20 + 0.10 + 0.30) / 3,
        }
    )
    better = diaz_rodriguez(EvalTable.from_rows([[0.5, 0.25], [0.75, 1.0]]))
    assert (better["bwt"], better["bwt_plus"], better["rem"]) == (0.25, 0.25, 1.0)
    assert math.isnan(diaz_rodriguez(ONE)["rem"])
    with pytest.raises(ValueError, match="defined for accuracies"):
        diaz_rodriguez(LOSS)
