"""The dictionary that goes to result.json, and the curves that go to MLflow."""

import math
import subprocess
import sys

import pytest

from cl.metrics import EvalTable, per_experience, summary

KEYS = {
    "final",
    "final_micro",
    "average",
    "learning",
    "bwt",
    "fwt",
    "forgetting_max",
    "forgetting_first",
    "intransigence",
    "aufc",
    "min_acc",
    "wc_acc",
    "stability_gap",
    "recovery",
    "late_average",
    "retention_exponent",
    "forward_facilitation",
}


def test_all_keys_with_all_inputs():
    table = EvalTable.from_rows([[0.9, 0.3], [0.6, 0.8]], R_init=[0.1, 0.2], within=[(1, 10, 0, 0.4), (1, 20, 0, 0.5)])
    assert summary(table, joint=[0.95, 0.85], num_samples=[100, 300]) == pytest.approx(
        {
            "final": 0.7,
            "final_micro": 0.75,
            "average": 0.8,
            "learning": 0.85,
            "bwt": -0.3,
            "fwt": 0.1,
            "forgetting_max": 0.3,
            "forgetting_first": 0.3,
            "intransigence": 0.05,
            "aufc": 0.15,
            "min_acc": 0.4,
            "wc_acc": 0.6,
            "stability_gap": 0.5,
            "recovery": 0.2,
            "late_average": 0.7,
            "retention_exponent": math.nan,
            "forward_facilitation": math.nan,
        },
        nan_ok=True,
    )


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_keys_do_not_depend_on_what_is_defined(num_rows, measure):
    table = EvalTable.from_rows([[0.9, 0.3], [0.6, 0.8]], measure=measure).upto(num_rows)
    metrics = summary(table)
    assert set(metrics) == KEYS
    assert all(type(value) is float for value in metrics.values())
    if num_rows == 0:
        assert all(math.isnan(value) for value in metrics.values())


def test_curves_of_three_experiences():
    table = EvalTable.from_rows([[0.80, 0.20, 0.10], [0.90, 0.70, 0.30], [0.60, 0.75, 0.95]])
    first, second, third = per_experience(table)
    assert first.seen_average == 0.80
    assert math.isnan(first.bwt)
    assert math.isnan(first.forgetting_avg)
    assert first.forgetting == {}
    assert second.seen_average == pytest.approx(0.8)
    assert second.bwt == pytest.approx(0.1)
    assert second.forgetting == pytest.approx({0: -0.1})
    assert third.bwt == pytest.approx((-0.2 + 0.05) / 2)
    assert third.forgetting == pytest.approx({0: 0.3, 1: -0.05})
    assert third.forgetting_avg == pytest.approx(0.125)


def test_curves_of_a_revisit():
    table = EvalTable.from_rows([[0.9, 0.3], [0.5, 0.8], [0.85, 0.6]], trained=[0, 1, 0])
    _, second, third = per_experience(table)
    assert second.forgetting == pytest.approx({0: 0.4})
    assert third.forgetting == pytest.approx({0: 0.05, 1: 0.2})


def test_no_experience_has_no_curve():
    assert per_experience(EvalTable.from_rows([[0.9]]).upto(0)) == []


def test_importing_the_metrics_brings_neither_torch_nor_scipy():
    code = "import sys, cl.metrics; print(sorted({'torch', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
