"""Identities that hold for every table (methods/hypernet_projection.md, 7.1)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.metrics import (
    EvalTable,
    aufc,
    average,
    bwt,
    cumulative_forgetting,
    final,
    forgetting_first,
    forgetting_max,
    learning,
    per_experience,
    seen_average,
)

checked = settings(derandomize=True, max_examples=100, deadline=None)
unit = st.floats(0, 1, width=32)


@st.composite
def streams(draw, min_experiences=2, measure="accuracy", revisits=True):
    """Tables with R complete; every domain is taught at least once, some again."""
    num_domains = draw(st.integers(min_experiences, 5))
    order = draw(st.permutations(range(num_domains)))
    extra = draw(st.lists(st.integers(0, num_domains - 1), max_size=4)) if revisits else []
    trained = [*order, *extra]
    draw_row = st.lists(unit, min_size=num_domains, max_size=num_domains)
    rows = [draw(draw_row) for _ in trained]
    return EvalTable.from_rows(rows, draw(draw_row), trained=trained, measure=measure)


@checked
@given(streams())
def test_best_earlier_is_never_below_first(table):
    assert forgetting_max(table) >= -bwt(table) - 1e-12
    assert forgetting_first(table) == pytest.approx(-bwt(table), abs=1e-12)


@checked
@given(streams(measure="loss"))
def test_losses_forget_with_the_sign_of_bwt(table):
    assert forgetting_first(table) == pytest.approx(bwt(table), abs=1e-12)
    assert forgetting_max(table) >= bwt(table) - 1e-12
    assert cumulative_forgetting(table) >= 0


@checked
@given(streams())
def test_final_is_learning_plus_backward_transfer(table):
    share = table.earlier.mean()
    assert final(table) == pytest.approx(learning(table) + share * bwt(table), abs=1e-9)


@checked
@given(streams(revisits=False))
def test_without_revisits_the_share_is_the_one_of_the_paper(table):
    T = table.num_experiences
    assert final(table) == pytest.approx(learning(table) + (T - 1) / T * bwt(table), abs=1e-9)


@checked
@given(st.lists(unit, min_size=4, max_size=4))
def test_two_experiences_have_one_earlier_value(values):
    table = EvalTable.from_rows(np.reshape(values, (2, 2)))
    assert forgetting_max(table) == pytest.approx(-bwt(table), abs=1e-12)


@checked
@given(streams(), st.sampled_from(["accuracy", "loss"]))
def test_columns_that_stay_as_learned_have_nothing_forgotten(table, measure):
    worse = 0.0 if measure == "accuracy" else 2.0
    R = np.where(table.visited, table.learned, worse)
    constant = EvalTable.from_rows(R, np.full(table.num_domains, worse), trained=table.trained, measure=measure)
    for metric in (bwt, forgetting_max, forgetting_first, aufc):
        assert metric(constant) == pytest.approx(0, abs=1e-12)


@checked
@given(streams())
def test_error_rate_as_a_loss_forgets_as_much_as_the_accuracy(table):
    # R_init of the loss must not compete with the earlier values, which for an accuracy it does not
    errors = EvalTable.from_rows(1 - table.R, np.full(table.num_domains, 9.0), trained=table.trained, measure="loss")
    for metric in (forgetting_max, forgetting_first, aufc):
        assert metric(errors) == pytest.approx(metric(table), abs=1e-9)
    assert bwt(errors) == pytest.approx(-bwt(table), abs=1e-9)


@checked
@given(streams(), st.randoms(use_true_random=False))
def test_the_order_of_the_columns_does_not_matter(table, random):
    columns = list(range(table.num_domains))
    random.shuffle(columns)
    shuffled = EvalTable.from_rows(
        table.R[:, columns], table.R_init[columns], trained=[columns.index(j) for j in table.trained]
    )
    for metric in (final, average, learning, bwt, forgetting_max, aufc):
        assert metric(shuffled) == pytest.approx(metric(table), abs=1e-9)


@checked
@given(streams())
def test_curves_end_in_the_scalars_of_the_run(table):
    curves = per_experience(table)
    assert curves[-1].bwt == pytest.approx(bwt(table))
    assert curves[-1].forgetting_avg == pytest.approx(forgetting_max(table))
    assert [point.seen_average for point in curves] == pytest.approx(seen_average(table).tolist())
