"""The retention plot: its numbers by hand, where it appears, and how long streams are drawn."""

import json
import re

import numpy as np
import pytest

from cl.report import payload, write_report
from cl.report.curves import MAX_RAW, view
from cl.report.figures import save_figures
from cl.report.html import page
from cl.report.load import sections
from cl.report.matrix_figures import running_mean
from cl.report.revisit import law_text
from cl.report.revisit_figure import revisits

# two classes, one per experience, in the order 0 1 1 1 0 1
ROWS = [[0.9, 0.1], [0.6, 0.8], [0.4, 0.85], [0.3, 0.9], [0.95, 0.5], [0.5, 0.9]]
PRACTISES = [[0], [1], [1], [1], [0], [1]]
SCOLE = {"trained": [-1] * 6, "practises": PRACTISES, "experiences": [f"class {c}" for (c,) in PRACTISES]}


def view_of(results):
    (section,) = sections(results)
    return view(section)


def test_points_by_hand(make_result):
    found = view_of([make_result("naive", 0, ROWS, **SCOLE)]).find("naive").revisit
    assert found.lag.tolist() == [1, 2, 3]
    assert found.count.tolist() == [3, 1, 1]
    assert found.value == pytest.approx([(0.6 + 0.5 + 0.5) / 3, 0.4, 0.3])
    assert found.practised == pytest.approx((0.9 + 0.8 + 0.85 + 0.9 + 0.95 + 0.9) / 6)
    weights = np.sqrt([3, 1, 1])
    slope = np.polyfit(np.log([1, 2, 3]), np.log(found.value), 1, w=weights)[0]
    assert found.law.exponent == pytest.approx(-slope)
    assert law_text(found).startswith(f"lag^−{-slope:.2f}")


def test_seeds_are_pooled(make_result):
    lower = [[max(0.0, value - 0.2) for value in row] for row in ROWS]
    runs = [make_result("naive", s, R, **SCOLE) for s, R in ((0, ROWS), (1, lower))]
    found = view_of(runs).find("naive").revisit
    assert found.num_seeds == 2
    assert found.count.tolist() == [6, 2, 2]
    assert found.value[1] == pytest.approx((0.4 + 0.2) / 2)


def test_only_where_domains_come_back(make_result, tmp_path):
    straight = view_of([make_result()])
    assert straight.find("naive").revisit is None
    again = view_of([make_result("naive", 0, ROWS, **SCOLE)])
    assert "revisit" not in [path.stem for path in save_figures(straight, tmp_path / "a")]
    assert "revisit" in [path.stem for path in save_figures(again, tmp_path / "b")]
    assert 'data-chart="revisit"' in page([again], "t")
    assert 'data-chart="revisit"' not in page([straight], "t")
    assert {column.key for column in again.more} >= {"late_average", "retention_exponent"}
    assert not {column.key for column in straight.more} & {"late_average", "retention_exponent"}


@pytest.mark.parametrize(("measure", "law", "sign"), [("accuracy", "~ lag^-b,", 1), ("loss", "~ lag^b,", -1)])
def test_the_exponent_is_that_of_the_law_beside_it(make_result, measure, law, sign):
    made = view_of([make_result("naive", 0, ROWS, measure=measure, **SCOLE)])
    (column,) = (column for column in made.more if column.key == "retention_exponent")
    assert law in column.note
    assert column.get("naive").mean == pytest.approx(sign * made.find("naive").revisit.law.exponent)


def test_page_and_table_hold_the_points(make_result, tmp_path):
    runs = [make_result(name, 0, ROWS, **SCOLE) for name in ("naive", "<b>")]
    text = page([view_of(runs)], "t")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert data["sections"][0]["strategies"][0]["revisit"]["lag"] == [1, 2, 3]
    assert payload.payload([view_of([make_result()])]).count('"revisit":null') == 1
    paths = write_report(runs, tmp_path)
    (table,) = (path for path in paths.tables if path.stem == "revisit")
    content = json.loads(table.read_text())
    assert content["columns"] == ["strategy", "lag", "pairs", "value"]
    assert [row[:3] for row in content["data"] if row[0] == "naive"] == [
        ["naive", 1, 3],
        ["naive", 2, 1],
        ["naive", 3, 1],
    ]


def test_too_few_lags_have_no_law(make_result, tmp_path):
    runs = [make_result("naive", 0, ROWS[:3], trained=[-1] * 3, practises=[[0], [1], [0]], experiences=list("abc"))]
    found = view_of(runs).find("naive").revisit
    assert not found.law.is_defined
    assert law_text(found) == "too few lags for a law"
    assert write_report(runs, tmp_path).figures


def test_points_without_a_law_are_named_and_no_experience_is_halved(make_result):
    few = {"trained": [-1] * 3, "practises": [[0], [1], [0]], "experiences": list("abc")}
    (axes,) = revisits(view_of([make_result(name, 0, ROWS[:3], **few) for name in ("naive", "replay")])).axes
    assert [text.get_text() for text in axes.texts] == ["naive", "replay"]
    low, high = axes.get_xlim()
    assert all(tick == round(tick) for tick in axes.get_xticks() if low <= tick <= high)


def long_run(make_result, count, seed=0):
    draw = np.random.default_rng(seed)
    order = draw.integers(10, size=count)
    R = draw.uniform(0.1, 0.9, (count, 10)).tolist()
    practises = [[int(c)] for c in order]
    return make_result(
        "naive", seed, R, trained=[-1] * count, practises=practises, experiences=[f"class {c}" for c in order]
    )


def test_long_streams_that_come_back_are_smoothed(make_result, tmp_path):
    assert view_of([long_run(make_result, MAX_RAW)]).smoothing == 1
    made = view_of([long_run(make_result, 240)])
    assert made.smoothing == 12
    assert '"smooth":12' in payload.payload([made])
    assert all(path.stat().st_size > 0 for path in save_figures(made, tmp_path))


def test_running_mean_skips_what_was_not_evaluated():
    found = running_mean(np.array([np.nan, 1.0, 3.0, np.nan, 5.0]), 3)
    assert np.isnan(found[0])
    assert found[1:].tolist() == [1.0, 2.0, 2.0, 4.0]
