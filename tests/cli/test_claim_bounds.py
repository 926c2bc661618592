"""When a claim holds: the mean within its tolerance or bounds, and every seed beyond the bound for single seeds."""

import pytest

from cl.cli.main import main
from cl.cli.reproduce import Claim, judged, page
from cl.result import Result


def result(name, seed, final):
    names = (name, [name], "mlp", "class_incremental", seed, ["a"], ["a"], [0], "accuracy")
    env = {"python": "3", "versions": {}}
    return Result(*names, metrics={"final": final}, status="done", env=env)


@pytest.mark.parametrize(
    ("claim", "values", "holds"),
    [
        ({"expected": 3, "tolerance": 1}, [1.5, 3.5, 2.5], True),
        ({"expected": 3, "tolerance": 1}, [1.0, 1.5, 2.5], False),
        ({"expected": 3, "tolerance": 1, "each_above": 0}, [0.1, 4.0, 4.9], True),
        ({"expected": 3, "tolerance": 1, "each_above": 0}, [0.0, 4.0, 5.0], False),
        ({"above": 98}, [97.0, 100.0], True),
        ({"above": 98}, [97.0, 98.0], False),
        ({"below": 25, "each_above": 20}, [21.0, 28.0], True),
        ({"below": 25, "each_above": 20}, [19.0, 28.0], False),
    ],
)
def test_holds(claim, values, holds):
    assert Claim("name", "line", **claim).holds(values) is holds


def test_difference_is_paired_and_the_bound_is_said():
    runs = {"ours": [result("ours", s, f) for s, f in ((0, 0.90), (1, 0.91), (2, 0.5))]}
    runs["theirs"] = [result("theirs", s, f) for s, f in ((1, 0.88), (0, 0.86))]
    claim = Claim("ours", "line", expected=3.5, tolerance=0.1, each_above=2.5, minus="theirs")
    row = judged(claim, runs)
    assert row[2] == "minus theirs 3.5 ± 0.1, each seed > 2.5"
    assert row[3:6] == ("3.50 ± 0.71", "2", "holds")
    assert (
        judged(Claim("ours", "line", expected=3.5, tolerance=0.1, each_above=3.2, minus="theirs"), runs)[5] == "FAILS"
    )


def test_a_claim_with_a_missing_seed_is_not_done():
    runs = {"ours": [result("ours", 0, 0.03)]}
    row = judged(Claim("ours", "line", expected=3, tolerance=1), runs, num_seeds=3)
    assert row[3:6] == ("3.00", "1 of 3", "not done")
    assert judged(Claim("ours", "line", expected=3, tolerance=1), {"ours": []}, num_seeds=3)[5] == "not done"


def test_failed_runs_are_no_success(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cl.cli.reproduce.check", lambda config: None)
    monkeypatch.setattr("cl.cli.reproduce.run_all", lambda plan, console: {str(each): "failed" for each in plan.runs})
    assert main(["reproduce", "split_mnist_sgd", "tracking=none"]) == 1
    assert "not done" in capsys.readouterr().out


def test_a_recalled_number_is_printed_and_never_asserted():
    row = judged(Claim("ours", "line", recalled=93.9), {"ours": [result("ours", 0, 0.5)]})
    assert row[2:6] == ("published (unverified) 93.9", "50.00", "1", "not asserted")


def test_a_known_difference_is_neither_hidden_nor_a_failure():
    runs = {"ours": [result("ours", 0, 0.03)]}
    claim = Claim("ours", "line", expected=81, tolerance=4, differs="one seed, which more seeds did not give")
    assert judged(claim, runs)[5] == "differs"
    assert judged(Claim("ours", "line", expected=3, tolerance=1, differs="none"), runs)[5] == "holds"
    assert page([judged(claim, runs)], [claim, claim], ["ours"], runs).count("which more seeds did not give") == 1
