"""The evaluation table: what it accepts, what it refuses, and what it derives from the order of visits."""

import json
import math

import numpy as np
import pytest

from cl.metrics import EvalTable

NAN = math.nan


def test_defaults_describe_a_stream_that_teaches_every_domain_once():
    table = EvalTable.from_rows([[0.9, 0.1], [0.7, 0.8]])
    assert table.trained == (0, 1)
    assert table.domains == table.experiences == ("0", "1")
    assert np.isnan(table.R_init).all()
    assert table.first_visit.tolist() == [0, 1]
    assert table.learned.tolist() == [0.9, 0.8]
    assert table.last.tolist() == [0.7, 0.8]
    assert table.earlier.tolist() == [True, False]


def test_identity_is_the_domain_in_a_stream_with_a_revisit_in_reverse_order():
    table = EvalTable.from_rows([[0.1, 0.9], [0.8, 0.6], [0.5, 0.7]], trained=[1, 0, 1])
    assert table.first_visit.tolist() == [1, 0]
    assert table.learned.tolist() == [0.8, 0.9]
    assert table.visited.tolist() == [[False, True], [True, True], [True, True]]
    assert table.earlier.tolist() == [True, True]


def test_a_domain_that_is_never_taught_has_no_first_visit():
    table = EvalTable.from_rows([[0.9, 0.1], [0.7, 0.3]], trained=[0, -1])
    assert table.trained == (0, None)
    assert table.first_visit.tolist() == [0, 2]
    assert table.learned.tolist() == pytest.approx([0.9, NAN], nan_ok=True)
    assert table.seen.tolist() == [[True, False], [True, False]]


def test_everything_counts_as_seen_until_an_experience_teaches_a_single_domain():
    table = EvalTable.from_rows(np.full((3, 2), 0.5), trained=[None, 1, 0])
    assert table.seen.tolist() == [[True, True], [False, True], [True, True]]


def test_none_nan_and_infinity_are_not_evaluated():
    table = EvalTable.from_rows([[None, math.inf], [NAN, 2.0]], measure="loss")
    assert np.isnan(table.R).tolist() == [[True, True], [True, False]]


def test_the_table_is_read_only_and_leaves_its_input_alone():
    rows = np.array([[0.9, 0.1], [0.7, 0.8]])
    table = EvalTable.from_rows(rows, practises=[[0], [0, 1]])
    rows[0, 0] = 0.0
    assert table.R[0, 0] == 0.9
    for array in (table.R, table.R_init, table.taught, table.practised):
        with pytest.raises(ValueError, match="read-only"):
            array.flat[0] = 0


def test_result_round_trip_through_json():
    table = EvalTable.from_rows(
        [[0.9, None, 0.1], [0.6, 0.8, 0.1]],
        R_init=[0.1, 0.2, None],
        trained=[0, None],
        domains=["a", "b", "held-out"],
        experiences=["first", "both"],
        within=[(1, 10, 0, 0.5), (1, 20, 0, None)],
    )
    stored = json.loads(json.dumps(table.to_result(), allow_nan=False))
    assert stored["R"] == [[0.9, None, 0.1], [0.6, 0.8, 0.1]]
    assert stored["R_init"] == [0.1, 0.2, None]
    assert stored["trained"] == [0, -1]
    again = EvalTable.from_result(stored)
    np.testing.assert_array_equal(again.R, table.R)
    np.testing.assert_array_equal(again.R_init, table.R_init)
    assert (again.trained, again.domains, again.experiences) == (table.trained, table.domains, table.experiences)
    assert again.within == table.within == ((1, 10, 0, 0.5),)


def test_result_of_an_interrupted_run_is_cut_to_its_rows():
    result = {
        "R": [[0.9, 0.1]],
        "R_init": [],
        "experiences": ["a", "b"],
        "domains": ["a", "b"],
        "trained": [0, 1],
        "measure": "accuracy",
        "within": [[0, 5, 0, 0.4], [1, 10, 0, 0.5]],
    }
    table = EvalTable.from_result(result)
    assert table.trained == (0,)
    assert table.experiences == ("a",)
    assert table.within == ((0, 5, 0, 0.4),)
    stopped_at_once = EvalTable.from_result(result | {"R": []})
    assert stopped_at_once.num_experiences == 0
    assert np.isnan(stopped_at_once.last).all()


def test_result_without_domains_takes_every_experience_for_one():
    table = EvalTable.from_result({"R": [[0.9, 0.1]], "experiences": ["a", "b"]})
    assert (table.trained, table.domains) == ((0,), ("a", "b"))
    backwards = EvalTable.from_result({"R": [[0.1, 0.9], [0.8, 0.7]], "experiences": ["a", "b"], "trained": [1, 0]})
    assert backwards.learned.tolist() == [0.8, 0.9]
    assert EvalTable.from_result({"R": [[0.9, 0.1], [0.7, 0.8]]}).learned.tolist() == [0.9, 0.8]


def test_upto_is_the_table_of_that_moment():
    table = EvalTable.from_rows([[0.9, 0.1], [0.7, 0.8]], within=[(0, 1, 0, 0.3), (1, 2, 0, 0.4)]).upto(1)
    assert table.R.tolist() == [[0.9, 0.1]]
    assert table.trained == (0,)
    assert table.within == ((0, 1, 0, 0.3),)


def test_mask_untrained_hides_heads_before_their_first_visit():
    rows = [[0.9, 0.5, 0.5], [0.8, 0.9, 0.5], [0.7, 0.8, 0.9]]
    table = EvalTable.from_rows(rows, R_init=[0.5, 0.5, 0.5], within=[(0, 1, 1, 0.5), (1, 2, 1, 0.6)])
    masked = table.mask_untrained()
    assert masked.R.tolist() == pytest.approx(
        np.array([[0.9, NAN, NAN], [0.8, 0.9, NAN], [0.7, 0.8, 0.9]]), nan_ok=True
    )
    assert np.isnan(masked.R_init).all()
    assert masked.within == ((1, 2, 1, 0.6),)


def test_direction_of_the_measure():
    values = [[0.2, NAN], [0.6, NAN]]
    accuracy = EvalTable.from_rows([[0.0]])
    loss = EvalTable.from_rows([[0.0]], measure="loss")
    assert accuracy.best(values).tolist() == pytest.approx([0.6, NAN], nan_ok=True)
    assert accuracy.worst(values).tolist() == pytest.approx([0.2, NAN], nan_ok=True)
    assert loss.best(values).tolist() == pytest.approx([0.2, NAN], nan_ok=True)
    assert loss.worst(values).tolist() == pytest.approx([0.6, NAN], nan_ok=True)
    assert accuracy.worsening(0.75, 0.5) == 0.25
    assert loss.worsening(0.75, 0.5) == -0.25


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"R": [[0.9, 0.1], [0.7]]}, "R is ragged: its rows have 1 to 2 values"),
        ({"R": [[0.9, "high"], [0.7, 0.8]]}, "R must hold numbers and nulls only: .*'high'"),
        ({"R": [0.9, 0.7]}, "R has 1 axes; expected 2"),
        ({"R": [[]]}, "R has no columns"),
        ({"R": []}, "R has no columns"),
        ({"R": [[0.9, 0.1]]}, "R has 1 rows and 2 columns; `trained` must say which domain each row teaches"),
        ({"R": [[90.0]]}, r"accuracy 90 is impossible; accuracies are fractions in \[0, 1\]"),
        ({"R": [[1.001]]}, "accuracy 1.001 is impossible"),
        ({"R": [[0.9]], "R_init": [-0.001]}, "accuracy -0.001 is impossible"),
        ({"R": [[0.9]], "R_init": [0.1, 0.1]}, "R_init has 2 entries; expected 1, one per column of R"),
        ({"R": [[0.9]], "trained": [0, 0]}, "trained has 2 entries; expected 1, one per row of R"),
        ({"R": [[0.9]], "trained": [1]}, "trained points at domain 1; there are 1, counted from 0"),
        ({"R": [[0.9]], "domains": ["a", "b"]}, "domains has 2 entries; expected 1, one per column of R"),
        ({"R": [[0.9]], "experiences": ["a", "b"]}, "experiences has 2 entries; expected 1, one per row of R"),
        ({"R": [[0.9, 0.1]], "trained": [0], "domains": ["a", "a"]}, "domains .* name a column twice"),
        ({"R": [[0.9]], "measure": "f1"}, "measure is 'f1'; allowed are accuracy, loss"),
        ({"R": [[0.9]], "within": [(0, 5, 0.5)]}, r"within holds \(0, 5, 0.5\); expected \(experience, step, domain"),
        ({"R": [[0.9]], "within": [(1, 5, 0, 0.5)]}, "within points at experience 1; there are 1"),
        ({"R": [[0.9]], "within": [(0, 5, 3, 0.5)]}, "within points at domain 3; there are 1"),
    ],
)
def test_impossible_tables_are_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvalTable.from_rows(**arguments)


def test_a_result_without_r_is_refused():
    with pytest.raises(ValueError, match="the result has no table R; its keys are seed, status"):
        EvalTable.from_result({"seed": 0, "status": "failed"})


def test_float32_noise_above_one_is_no_error():
    EvalTable.from_rows([[float(np.float32(1) + np.float32(1e-6))]])
