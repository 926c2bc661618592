"""Names, steps and values against a table worked out by hand."""

import json
import math

import pytest

from cl.tracking import Memory, Point, points
from cl.tracking.points import config_hash, description, is_settled, last_points, legal_name, matrix_table, task_name

ROWS = [[0.9, 0.2, None], [0.6, 0.8, 0.1], [0.7, 0.5, 0.95]]

# step -> name -> value, from the definitions in shared/methods/ecosystem.md
BY_HAND = {
    1: {"accuracy/task_00": 0.9, "accuracy/task_01": 0.2, "summary/accuracy_avg": 0.9},
    2: {
        "accuracy/task_00": 0.6,
        "accuracy/task_01": 0.8,
        "accuracy/task_02": 0.1,
        "forgetting/task_00": 0.3,
        "summary/accuracy_avg": 0.7,
        "summary/forgetting_avg": 0.3,
        "summary/bwt": -0.3,
    },
    3: {
        "accuracy/task_00": 0.7,
        "accuracy/task_01": 0.5,
        "accuracy/task_02": 0.95,
        # the best earlier value of the first domain is 0.9, not the 0.6 just before
        "forgetting/task_00": 0.2,
        "forgetting/task_01": 0.3,
        "summary/accuracy_avg": 2.15 / 3,
        "summary/forgetting_avg": 0.25,
        "summary/bwt": -0.25,
    },
}


def by_step(found):
    steps = {}
    for point in found:
        assert point.name not in steps.setdefault(point.step, {}), point
        steps[point.step][point.name] = point.value
    return steps


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_experience(make_result, stage):
    result = make_result(R=ROWS[: stage + 1])
    assert by_step(points(result, stage)) == {stage + 1: pytest.approx(BY_HAND[stage + 1])}


def test_all_experiences_and_the_last_values(make_result):
    result = make_result(
        R=ROWS,
        metrics={"final": 0.71, "forgetting_max": 0.25, "bwt": -0.25, "fwt": None, "aufc": math.nan},
        cost={"wall_s": 3.0, "peak_memory_bytes": 5e8, "forwards": 100},
    )
    assert by_step(points(result)) == {step: pytest.approx(values) for step, values in BY_HAND.items()}
    result.status = "done"
    last = {
        "final/accuracy_avg": 0.71,
        "final/forgetting_avg": 0.25,
        "final/bwt": -0.25,
        "cost/seconds": 3.0,
        "cost/memory_mb": 500.0,
        "cost/forwards": 100,
    }
    assert by_step(last_points(result)) == {3: last}
    assert by_step(points(result))[3] == pytest.approx(BY_HAND[3] | last)


def test_losses_have_perplexities_and_forget_by_rising(make_result):
    result = make_result(measure="loss", R=[[1.0, 3.0, None], [2.0, 1.5, None]], R_init=[4.0, 4.0, 4.0])
    found = by_step(points(result, 1))[2]
    assert found["loss/task_00"] == 2.0
    assert found["perplexity/task_01"] == pytest.approx(math.exp(1.5))
    assert found["forgetting/task_00"] == pytest.approx(1.0)
    assert found["summary/loss_avg"] == pytest.approx(1.75)
    assert found["summary/perplexity_avg"] == pytest.approx(math.exp(1.75))
    assert "loss/task_02" not in found


def test_text_has_bits_per_byte_and_what_else_was_measured(make_result):
    """8 nats over 10 tokens in 40 bytes are 2 nats a byte; what else was measured keeps its experience and column."""
    sizes = {"num_tokens": [10, 20, 30], "num_bytes": [40, 10, 60]}
    extra = [["format valid", 1, 2, 0.75], ["exact[match]", 1, 0, 0.5], ["exact[match]", 0, 0, 0.25]]
    result = make_result(measure="loss", R=[[1.0, 3.0, None], [8.0, 0.5, None]], R_init=[4.0] * 3, extra=extra, **sizes)
    found = by_step(points(result, 1))[2]
    bits = {name: value for name, value in found.items() if name.startswith("bpb/")}
    assert bits == {
        "bpb/task_00": pytest.approx(2.0 / math.log(2)),
        "bpb/task_01": pytest.approx(1.0 / math.log(2)),
    }
    beside = {name: value for name, value in found.items() if name.startswith(("format", "exact"))}
    assert beside == {"format valid/task_02": 0.75, "exact_match_/task_00": 0.5}


def test_losses_over_tokens(make_result):
    """Worked out by hand: before training, inside the second experience, and after both; no rate before training."""
    result = make_result(measure="loss", R_init=[4.0, 5.0, None], R=[[1.0, 3.0, None], [2.0, 1.5, None]])
    result.course = [
        [-1, 0, 0, 0.0],
        [0, 3, 24, 0.5],
        [0, 6, 48, 0.4],
        [1, 7, 56, 0.3],
        [1, 8, 64, 0.2],
        [1, 9, 72, 0.1],
    ]
    result.within = [[1, 8, 1, 2.5]]
    found = [tuple(p) for p in points(result) if p.name.startswith("tokens/")]
    assert sorted(found) == [
        ("tokens/lr", 0.1, 72),
        ("tokens/lr", 0.2, 64),
        ("tokens/lr", 0.4, 48),
        ("tokens/task_00", 1.0, 48),
        ("tokens/task_00", 2.0, 72),
        ("tokens/task_00", 4.0, 0),
        ("tokens/task_01", 1.5, 72),
        ("tokens/task_01", 2.5, 64),
        ("tokens/task_01", 3.0, 48),
        ("tokens/task_01", 5.0, 0),
    ]
    assert [step for *_, step in found] == sorted(step for *_, step in found)
    last = [tuple(p) for p in points(result, 1) if p.name.startswith("tokens/")]
    assert sorted(last) == [("tokens/lr", 0.1, 72), ("tokens/task_00", 2.0, 72), ("tokens/task_01", 1.5, 72)]


def test_a_description_names_forty_domains(make_result):
    names = [f"{'long' * 20}{j}" for j in range(42)]
    head, blank, *rows = description(make_result(domains=names)).splitlines()
    assert (head, blank) == ("derpp+refresh on permuted_digits, domain incremental, mlp, seed 7", "")
    assert rows[39] == f"- `task_39`: {'long' * 15}"
    assert rows[40:] == ["- and 2 more, in `result.json`"]
    assert "more, in" not in description(make_result(domains=names[:40]))


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("a//b/", "a/b"),
        ("./a/../b", "a/b"),
        ("loss[é]", "loss_é_"),
        ("a" * 249 + "/b", "a" * 249),
        ("a-b.c:d e", "a-b.c:d e"),
    ],
)
def test_names_that_mlflow_takes(name, legal):
    assert legal_name(name) == legal


def test_values_that_are_no_numbers_are_left_out(make_result):
    result = make_result(R=[[math.nan, math.inf, 0.5]])
    assert {p.name for p in points(result)} == {"accuracy/task_02"}


def test_a_revisit_adds_a_step_and_no_name(make_result):
    result = make_result(domains=["a", "b"], trained=[0, 1, 0], R=[[0.9, 0.1], [0.5, 0.8], [0.9, 0.6]])
    found = by_step(points(result, 2))[3]
    assert found["forgetting/task_00"] == pytest.approx(0.0)
    assert found["forgetting/task_01"] == pytest.approx(0.2)


def test_within_is_kept_before_its_experience_has_ended(make_result):
    result = make_result(R=[ROWS[0]], within=[[0, 5, 0, 0.4], [1, 15, 1, 0.3]])
    found = [p for p in points(result) if p.name.startswith("train/")]
    assert found == [Point("train/within/task_00", 0.4, 5), Point("train/within/task_01", 0.3, 15)]


def test_width_follows_the_number_of_domains():
    assert task_name("accuracy", 7, 100) == "accuracy/task_07"
    assert task_name("accuracy", 7, 101) == "accuracy/task_007"


def test_what_stays_after_a_resume():
    assert is_settled(Point("train/loss", 1.0, 50), steps=50, experiences=0)
    assert not is_settled(Point("train/loss", 1.0, 51), steps=50, experiences=3)
    assert is_settled(Point("accuracy/task_00", 1.0, 3), steps=50, experiences=3)
    assert not is_settled(Point("accuracy/task_00", 1.0, 4), steps=50, experiences=3)
    for name in ("final/bwt", "cost/seconds"):
        assert not is_settled(Point(name, 1.0, 1), steps=None, experiences=3)
    assert is_settled(Point("train/loss", 1.0, 51), steps=None, experiences=0)


def test_table_is_long_and_without_empty_cells(make_result):
    table = matrix_table(make_result(R=ROWS[:2]))
    assert table["columns"] == ["after_experience", "domain", "accuracy"]
    assert table["data"] == [["a", "a", 0.9], ["a", "b", 0.2], ["b", "a", 0.6], ["b", "b", 0.8], ["b", "c", 0.1]]
    json.dumps(table, allow_nan=False)


def test_config_hash_ignores_the_seed_only():
    assert config_hash({"a": 1, "seed": 1}) == config_hash({"seed": 2, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_recorded_run_says_what_its_result_says(make_result, tell):
    memory, result = Memory(), make_result()
    tell([memory], result)
    evaluation = [p for p in memory.points if not p.name.startswith("train/")]
    assert by_step(evaluation) == by_step(points(result))
