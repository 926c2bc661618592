"""The first checkpoint of a branch, made by hand from that of a run."""

import copy

import pytest

from cl.branch import as_new_run, longer, reopened
from cl.core import UserError


def payload(position):
    """Of a run of experiences of 10 and 20 steps on three domains."""
    groups = [{"params": [0], "lr": 0.05, "initial_lr": 0.1}, {"params": [1], "lr": 0.2, "initial_lr": 0.4}]
    return {
        "format": "cl-lab checkpoint 1",
        "fingerprint": "abc",
        "position": position,
        "content": "rows",
        "strategies": [{"seen": 7}],
        "state": {"counters": [30, 900, 1, 2], "optimizer": {"state": {0: "momentum"}, "param_groups": groups}},
        "ledger": {
            "clock": {"train_s": 3.0},
            "result": [[[0.9, 0.2, None], [0.7, 0.8, None]], [0.1, 0.1, 0.1], [[0, 5, 0, 0.6]], "the run's"],
            "extra": [["length", -1, 0, 1.0], ["length", 0, 0, 2.0], ["length", 1, 1, 3.0], ["depth", 1, 2, 4.0]],
            "course": [[0, 10, 300, 0.1], [1, 30, 900, 0.1]],
        },
    }


def test_a_run_behind_an_experience_is_moved_back_to_its_last_step():
    before = payload([2, 0])
    kept = copy.deepcopy(before)
    found = reopened(before, [10, 20])
    assert before == kept, "the run that it came from is only read"
    assert found["position"] == [1, 20]
    ledger = found["ledger"]
    # its last row becomes a measurement at step 30; what is measured at its end is measured again
    within = [[0, 5, 0, 0.6], [1, 30, 0, 0.7], [1, 30, 1, 0.8]]
    assert ledger["result"] == [[[0.9, 0.2, None]], [0.1, 0.1, 0.1], within, "the run's"]
    assert ledger["extra"] == [["length", -1, 0, 1.0], ["length", 0, 0, 2.0]]
    assert (ledger["clock"], ledger["course"]) == (kept["ledger"]["clock"], kept["ledger"]["course"])
    assert {**found, "position": None, "ledger": None} == {**kept, "position": None, "ledger": None}


def test_a_run_inside_an_experience_stays_there():
    assert reopened(payload([1, 4]), [10, 20]) == payload([1, 4])
    assert reopened(payload([0, 4]), [10, 20]) == payload([0, 4])


def test_a_run_without_a_step_is_not_moved():
    with pytest.raises(UserError, match="has taken no step yet"):
        reopened(payload([0, 0]), [10, 20])


def test_checkpoints_of_before_have_nothing_measured_beside():
    old = payload([1, 0])
    del old["ledger"]["extra"]
    assert reopened(old, [10, 20])["ledger"]["extra"] == []


@pytest.mark.parametrize("rate", [None, 2.0])
def test_a_new_run_is_tracked_on_its_own_at_its_own_rate(rate):
    before = payload([1, 4])
    kept = copy.deepcopy(before)
    found = as_new_run(before) if rate is None else as_new_run(before, rate)
    assert before == kept
    expected = payload([1, 4])
    del expected["format"], expected["fingerprint"]
    expected["ledger"]["result"][3] = None
    for group, initial in zip(expected["state"]["optimizer"]["param_groups"], (0.1, 0.4), strict=True):
        group["initial_lr"] = initial * (rate or 1.0)
    assert found == expected


@pytest.mark.parametrize(
    ("wanted", "position", "expected"),
    [
        ([15, 15, 15], [0, 0], [15, 15, 15]),
        ([15, 15, 15], [1, 0], [10, 15, 15]),
        ([15, 15, 15], [2, 9], [10, 10, 15]),
        ([15, 15, 15], [3, 0], [10, 10, 15]),
        ([10, 10, 11], [1, 4], [10, 10, 11]),
        # what is behind the run cannot change, whatever is asked for it
        ([5, 10, 11], [1, 4], [10, 10, 11]),
    ],
)
def test_more_steps_for_what_is_left(wanted, position, expected):
    assert longer([10, 10, 10], wanted, position) == expected


@pytest.mark.parametrize("wanted", [[10, 10, 10], [20, 10, 10], [10, 9, 20], [10, 20, 9], [10, 10, 9]])
def test_a_budget_that_gives_less_or_nothing_more_is_refused(wanted):
    with pytest.raises(UserError) as caught:
        longer([10, 10, 10], wanted, [1, 4])
    assert f"gives {wanted[1:]} steps to the experiences that are left, and [10, 10] were planned" in str(caught.value)
