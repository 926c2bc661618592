import json
import math

import numpy as np
import pytest

from cl.metrics import EvalTable
from cl.metrics.facilitation import period_of
from cl.report import payload, write_report
from cl.report.curves import view
from cl.report.html import page
from cl.report.load import sections, table_of
from cl.report.payload import worst_points
from cl.report.within import Within, first_domains, inside
from cl.report.within_figure import inside_experiences
from cl.report.words import glossary

# experiences of 25 and 20 steps, evaluated every 10; domain 0 falls from 0.9 to 0.3 and ends at 0.6
DIP = [[0, 10, 0, 0.5], [0, 20, 0, 0.7], [1, 35, 0, 0.3], [1, 35, 1, 0.4]]


@pytest.fixture
def dip(make_result):
    def make(strategy="naive", seed=0, within=DIP, updates=45, **changes):
        return make_result(strategy, seed, within=within, cost={"updates": updates}, **changes)

    return make


def view_of(results):
    (section,) = sections(results)
    return view(section)


def test_the_course_by_hand(dip):
    made = view_of([dip()])
    found = made.find("naive").within
    # the second experience starts one period before its first evaluation, and the run ends with its last step
    assert found.steps == [10, 20, 25, 35, 45]
    assert found.ends == [25, 45]
    np.testing.assert_array_equal(found.values, [[0.5, 0.7, 0.9, 0.3, 0.6], [math.nan, math.nan, math.nan, 0.4, 0.8]])
    assert (found.period, found.num_seeds) == (10, 1)
    assert made.domains_within == [0, 1]


def test_seeds_are_averaged_at_the_same_place_of_an_experience(dip):
    # the first experience of seed 1 is 4 steps longer, so everything after comes later
    later = [[0, 10, 0, 0.7], [0, 20, 0, 0.9], [1, 39, 0, 0.5], [1, 39, 1, 0.6]]
    found = view_of([dip(), dip(seed=1, within=later, updates=49)]).find("naive").within
    assert found.steps == [10, 20, 27, 37, 47]
    assert found.values[0] == pytest.approx([0.6, 0.8, 0.9, 0.4, 0.6])
    assert found.num_seeds == 2


def test_evaluations_that_only_one_seed_has_are_left_out(dip):
    longer = [*DIP[:2], [0, 30, 0, 0.8], [1, 45, 0, 0.3]]
    found = view_of([dip(), dip(seed=1, within=longer, updates=55)]).find("naive").within
    assert found.steps == [10, 20, 30, 40, 50]
    assert np.isnan(found.values[1, 3])


def test_ends_that_do_not_follow_are_left_out(dip):
    assert view_of([dip(updates=None)]).find("naive").within.ends == [25]
    # 12 steps after the start and then 28 are no even steps: 35 - 12 lies before the evaluation at step 28
    uneven = [[0, 12, 0, 0.5], [0, 28, 0, 0.7], [1, 35, 0, 0.3]]
    assert view_of([dip(within=uneven)]).find("naive").within.ends == [45]


def test_period_is_that_of_the_first_evaluation_or_the_smallest_gap():
    table = EvalTable.from_rows([[0.9, 0.1], [0.8, 0.7]], within=[(1, 30, 0, 0.5), (1, 45, 0, 0.5), (1, 60, 0, 0.6)])
    assert period_of(table) == 15
    assert period_of(EvalTable.from_rows([[0.9, 0.1], [0.8, 0.7]], within=[(1, 30, 0, 0.5)])) == 0
    assert period_of(EvalTable.from_rows([[0.9]])) == 0


def test_first_means_taught_first(make_result):
    order, everything = [2, 0, 3, 1], [[i, 10 * i + 5, j, 0.5] for i in range(4) for j in range(4)]
    run = make_result(R=np.full((4, 4), 0.5).tolist(), trained=order, within=everything)
    assert first_domains([table_of(run)]) == [2, 0, 3]
    # before a domain was taught its value says nothing of forgetting
    found = inside([run], {0: table_of(run)}, [2, 0, 3])
    assert np.isnan(found.values).sum(axis=1).tolist() == [0, 2, 4]


def test_absent_without_evaluations_inside(tmp_path, runs):
    made = view_of(runs)
    assert all(strategy.within is None for strategy in made.strategies)
    text = page([made], "T")
    assert 'data-chart="within"' not in text
    assert "Stability gap" not in text


def test_absent_for_a_single_experience_and_for_a_bound(make_result, dip):
    single = make_result(R=[[0.9]], within=[[0, 5, 0, 0.5]], cost={"updates": 10})
    assert 'data-chart="within"' not in page([view_of([single])], "T")
    joint = dip("joint", R=[[0.9, 0.9]], experiences=["all"], trained=[-1], within=[[0, 10, 0, 0.5]])
    assert view_of([dip(), joint]).find("joint").within is None


def test_everything_has_it(tmp_path, dip, make_result):
    paths = write_report([dip(), dip(seed=1), make_result("replay", 0)], tmp_path)
    assert "within.png" in [path.name for path in paths.figures]
    text = paths.html.read_text()
    assert 'data-chart="within"' in text
    assert '"steps":[10.0,20.0,25.0,35.0,45.0],"ends":[2,4]' in text
    assert '"values":[[5000,7000,9000,3000,6000],[null,null,null,4000,8000]],"seeds":2' in text
    tables = {path.stem: json.loads(path.read_text()) for path in paths.tables}
    assert tables["within"]["columns"] == ["strategy", "seed", "experience", "step", "domain", "value"]
    assert ["naive", 1, 1, 35, "domain 0", 0.3] in tables["within"]["data"]
    assert ["naive", "min_acc", 1, 0.3] in tables["seeds"]["data"]
    # the fall from 0.9 to 0.3; of two domains one now at 0.8 and one at worst 0.3
    values = {tuple(row[:3]): row[3] for row in tables["comparison"]["data"]}
    assert values["naive", "stability_gap", "mean"] == pytest.approx(0.6)
    assert values["naive", "wc_acc", "mean"] == pytest.approx(0.55)
    assert ("replay", "wc_acc", "mean") not in values
    lines = paths.markdown.read_text().splitlines()
    assert "| Strategy | min-ACC (%) | WC-ACC (%) | Stability gap (%) |" in lines
    assert "| naive | 30.0 \\[30.0, 30.0\\] | 55.0 \\[55.0, 55.0\\] | 60.0 \\[60.0, 60.0\\] |" in lines


def test_words_for_losses_and_the_grid(dip):
    run = dip(R=[[2.0, 4.0], [3.0, 2.5]], measure="loss", within=[[0, 10, 0, 2.5], [1, 30, 0, 3.5], [1, 30, 1, 3.0]])
    made = view_of([run])
    notes = dict(glossary(made))
    assert notes["Stability gap"].startswith("rise from the value before an experience to the highest inside it")
    assert notes["Worst loss"].endswith("evaluated every 10 steps")
    gap = next(column for column in made.more if column.key == "stability_gap")
    assert gap.values["naive"].mean == pytest.approx(1.5)


def test_one_panel_per_strategy_and_a_line_per_end(dip, make_result):
    figure = inside_experiences(view_of([dip(), dip("replay"), make_result("ewc")]))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 2
    upright = [line for line in shown[0].lines if len(set(line.get_xdata())) == 1 and list(line.get_ydata()) == [0, 1]]
    assert [line.get_xdata()[0] for line in upright] == [25, 45]


def test_thinning_keeps_ends_and_falls(dip, monkeypatch):
    values = np.array([[0.9, 0.2, 0.8, 0.7, 0.9, 0.6, 0.5]])
    found = Within([1, 2, 3, 4, 5, 6, 7], values, [False, False, False, False, True, False, False], 1, 1)
    assert worst_points(found, 1, True) == list(range(7))
    assert worst_points(found, 3, True) == [1, 3, 4, 6]
    assert worst_points(found, 3, False) == [0, 3, 4, 5]
    monkeypatch.setattr(payload, "MAX_POINTS", 3)
    (section,) = json.loads(payload.payload([view_of([dip()])]))["sections"]
    assert section["strategies"][0]["within"]["worst_of"] == 2
    assert section["strategies"][0]["within"]["steps"] == [10, 25, 35, 45]
