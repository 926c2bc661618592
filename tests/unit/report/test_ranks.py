import math
import re

import pytest

from cl.report import write_report
from cl.report.comparison import comparison_rows
from cl.report.curves import view
from cl.report.html import page
from cl.report.load import sections
from cl.report.markdown import markdown, save_tables
from cl.report.more import more_text
from cl.report.rank_figure import average_ranks
from cl.report.ranks import joined, rank

FINALS = {"naive": (0.4, 0.3, 0.2), "ewc": (0.5, 0.4, 0.7), "replay": (0.8, 0.7, 0.7)}


@pytest.fixture
def finals(make_result):
    """Runs whose final measure is what the test says: strategy -> value of each seed."""

    def make(values=FINALS, **changes):
        return [
            make_result(label, seed, [[0.9, 0.1], [value, value]], **changes)
            for label, each in values.items()
            for seed, value in enumerate(each)
        ]

    return make


def view_of(results):
    (section,) = sections(results)
    return view(section)


def test_ranks_are_those_of_the_hand(finals):
    # on seed 2 ewc and replay share ranks 1 and 2
    ranks = rank(comparison_rows(finals()))
    assert list(ranks.average) == ["replay", "ewc", "naive"]
    assert ranks.average == pytest.approx({"replay": 3.5 / 3, "ewc": 5.5 / 3, "naive": 3.0})
    assert ranks.seeds == (0, 1, 2)
    # q for three groups at 5 % is 2.343; CD = q sqrt(k (k + 1) / 6 N)
    assert ranks.critical_difference == pytest.approx(2.343 * math.sqrt(12 / 18), abs=1e-3)


def test_the_lowest_loss_is_first(finals):
    ranks = rank(comparison_rows(finals(measure="loss")))
    assert next(iter(ranks.average)) == "naive"


def test_joint_and_what_did_not_finish_take_no_part(finals, make_result):
    results = finals()
    results += [make_result("joint", s, [[0.9, 0.9]], experiences=["all"], trained=[-1]) for s in range(3)]
    results.append(make_result("si", 0, [[0.9, 0.1]], status="failed"))
    assert set(rank(comparison_rows(results)).average) == set(FINALS)


def test_only_seeds_that_all_have_are_blocks(finals):
    few = finals({"naive": (0.4, 0.3, 0.2, 0.9), "ewc": (0.5, 0.4), "replay": (0.8, 0.7, 0.7)})
    assert rank(comparison_rows(few)).seeds == (0, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"naive": (0.4, 0.3), "replay": (0.8, 0.7)},
        {"naive": (0.4,), "ewc": (0.5,), "replay": (0.8,)},
        {"naive": (0.4, 0.3), "ewc": (0.5, 0.6), "replay": (0.8,)},
    ],
    ids=["two strategies", "one seed", "one seed in common"],
)
def test_absent_where_there_is_nothing_to_rank(tmp_path, finals, values):
    made = view_of(finals(values))
    assert made.ranks is None
    assert 'data-chart="ranks"' not in page([made], "T")
    assert "Average rank" not in markdown([made], "T")
    assert "average_rank" not in "".join(path.read_text() for path in save_tables(made, tmp_path))


def test_groups_by_hand():
    average = {"a": 1.0, "b": 2.0, "c": 3.5, "d": 4.0}
    assert joined(average, 0.5) == []
    assert joined(average, 0.6) == [("c", "d")]
    assert joined(average, 1.6) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert joined(average, 2.1) == [("a", "b"), ("b", "c", "d")]
    assert joined(average, 3.1) == [("a", "b", "c", "d")]
    assert joined({"a": 1.5, "b": 1.5, "c": 3.0}, 1.0) == [("a", "b")]


def test_two_seeds_are_too_few_for_a_critical_difference(finals):
    # 2.343 sqrt(12 / 12) is more than the 2 ranks that can lie between three strategies; sqrt(12 / 18) is less
    made = view_of(finals({label: values[:2] for label, values in FINALS.items()}))
    assert made.ranks.critical_difference == pytest.approx(2.343, abs=1e-3)
    assert made.ranks.groups == []
    assert made.ranks.sentence == (
        "2 paired seeds are too few to tell 3 strategies apart by rank: even the first and the last of every seed "
        "would be within the critical difference; 3 seeds are the least that can."
    )
    assert "3 seeds are the least that can" in page([made], "T")
    assert not [text for text in average_ranks(made).axes[0].texts if "critical" in text.get_text()]


def test_ranks_that_may_be_chance_join_all(finals):
    # every strategy has every rank once
    made = view_of(finals({"naive": (0.1, 0.2, 0.3), "ewc": (0.2, 0.3, 0.1), "replay": (0.3, 0.1, 0.2)}))
    assert made.ranks.friedman_p == pytest.approx(1)
    assert [set(group) for group in made.ranks.groups] == [set(FINALS)]
    assert made.ranks.sentence == "Over 3 paired seeds the ranks do not tell the strategies apart (Friedman p = 1.000)."


@pytest.mark.filterwarnings("error")
def test_ties_everywhere_are_no_difference(finals):
    made = view_of(finals(dict.fromkeys(FINALS, (0.5, 0.1 + 0.2, 0.7))))
    assert set(made.ranks.average.values()) == {2.0}
    assert not made.ranks.is_different
    assert made.ranks.sentence == "Over 3 paired seeds the ranks do not tell the strategies apart."


def test_enough_seeds_tell_the_ends_apart(finals):
    made = view_of(finals({"naive": [0.2] * 6, "ewc": [0.5] * 6, "replay": [0.8] * 6}))
    # chi square 12 with two degrees of freedom
    assert made.ranks.friedman_p == pytest.approx(math.exp(-6))
    assert made.ranks.groups == [("replay", "ewc"), ("ewc", "naive")]
    assert "critical difference 1.35 (Nemenyi at 5 %, Friedman p = 0.002)" in made.ranks.sentence
    axes = average_ranks(made).axes[0]
    written = [text.get_text() for text in axes.texts]
    assert {"replay", "1.00", "ewc", "2.00", "naive", "3.00", "critical difference 1.35"} <= set(written)


def test_ranks_of_two_digits_do_not_run_into_names(finals):
    made = view_of(finals({f"strategy_{k:02d}": [k / 20] * 3 for k in range(12)}))
    figure = average_ranks(made)
    figure.draw_without_rendering()
    texts = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    for left, right in (("strategy_11", "1.00"), ("12.00", "strategy_00"), ("7.00", "strategy_05")):
        assert texts[right].x0 - texts[left].x1 > 4, "pixels, of 150 to the inch"
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in texts.values())


def test_figure_table_page_and_markdown_have_them(tmp_path, finals):
    paths = write_report(finals(), tmp_path)
    assert "ranks.png" in [path.name for path in paths.figures]
    text = paths.html.read_text()
    assert 'data-chart="ranks"' in text
    assert '"ranks":{"average":{"replay":1.16667,"ewc":1.83333,"naive":3.0},"difference":1.91' in text
    assert "![ranks](figures/ranks.png)" in paths.markdown.read_text()
    tables = {path.stem: path.read_text() for path in paths.tables}
    assert '["naive","average_rank","mean",3.0]' in tables["comparison"]
    assert re.search(r'\["ewc","average_rank","critical_difference",1\.91', tables["comparison"])


def test_interquartile_mean_leaves_the_outlier_out(finals):
    made = view_of(finals({"naive": (0.1, 0.6, 0.7, 0.8), "replay": (0.6, 0.7, 0.8)}))
    (column,) = made.more
    assert (column.key, set(column.values)) == ("iqm", {"naive"})
    found = column.values["naive"]
    assert found.mean == pytest.approx(0.65)
    assert 0.1 <= found.low < 0.65 < found.high <= 0.8
    heads, cells = more_text(made.more, made.rows)
    assert heads == ["Strategy", "Interquartile mean (%)"]
    assert [line[0] for line in cells] == ["naive"]
    assert cells[0][1].startswith("65.0 [")
    assert "Interquartile mean" in page([made], "T")


def test_without_more_numbers_there_is_no_second_table(runs):
    made = view_of(runs)
    assert made.more == []
    assert "More numbers" not in page([made], "T")
    assert sum(line.startswith("| ---") for line in markdown([made], "T").splitlines()) == 1
