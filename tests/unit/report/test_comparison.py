import math

import pytest

from cl.report.comparison import comparison_rows, metrics_of, table_text


def by_name(results, **options):
    return {row.strategy: row for row in comparison_rows(results, **options)}


def test_numbers_are_those_of_the_hand(runs):
    rows = by_name(runs)
    naive = rows["naive"].metrics
    assert naive["final"].values == pytest.approx({0: 0.7, 1: 0.6})
    assert naive["final"].mean == pytest.approx(0.65)
    assert naive["average"].mean == pytest.approx((0.8 + 0.7) / 2)
    assert naive["learning"].mean == pytest.approx((0.85 + 0.8) / 2)
    assert naive["forgetting_max"].mean == pytest.approx(0.35)
    assert naive["bwt"].mean == pytest.approx(-0.35)
    # of two values every bootstrap mean is one of them or their middle
    assert (naive["final"].low, naive["final"].high) == pytest.approx((0.6, 0.7))


def test_difference_is_paired_by_seed(runs):
    row = by_name(runs)["replay"]
    assert row.difference.mean == pytest.approx(0.15)
    assert (row.difference.low, row.difference.high) == pytest.approx((0.1, 0.2))
    assert row.num_pairs == 2
    assert row.test == "too few seeds to test: 2, needs 7"
    assert not row.is_significant
    assert math.isnan(by_name(runs)["naive"].difference.mean)


def test_a_strategy_with_fewer_pairs_may_be_significant_all_the_same(make_result):
    """Holm tests it last, at 0.05: the other strategy, with more pairs, was tested first."""
    runs = [make_result("naive", seed, [[0.9, 0.1], [0.5 + seed / 1000, 0.8]]) for seed in range(10)]
    runs += [make_result("replay", seed, [[0.9, 0.1], [0.7 + seed / 500, 0.8]]) for seed in range(10)]
    runs += [make_result("ewc", seed, [[0.9, 0.1], [0.6 + seed / 300, 0.8]]) for seed in range(6)]
    row = by_name(runs)["ewc"]
    assert row.is_significant
    assert row.test == "p = 0.031"


def test_best_comes_first_and_what_did_not_finish_last(runs):
    assert [row.strategy for row in comparison_rows(runs)] == ["joint", "replay", "naive", "ewc"]
    ewc = by_name(runs)["ewc"]
    assert (ewc.seeds, ewc.num_failed, ewc.num_interrupted) == ((), 1, 0)
    assert not ewc.final.is_defined


def test_joint_has_a_final_value_and_nothing_to_forget(runs):
    joint = by_name(runs)["joint"].metrics
    assert joint["final"].mean == pytest.approx(0.925)
    assert not joint["forgetting_max"].is_defined
    assert not joint["bwt"].is_defined


def test_a_single_experience_has_no_forgetting(make_result):
    row = by_name([make_result(R=[[0.9]])])["naive"]
    assert row.final.mean == 0.9
    assert not row.metrics["forgetting_max"].is_defined


def test_costs_are_means_over_seeds_and_may_be_missing(runs, make_result):
    rows = by_name(runs)
    assert rows["naive"].passes == 1500
    assert rows["replay"].passes == 3000
    assert rows["replay"].buffer_bytes == 2048
    assert math.isnan(rows["replay"].train_s)
    assert math.isnan(by_name([make_result(cost={})])["naive"].passes)


def test_enough_seeds_give_a_p_value(make_result):
    results = [make_result("naive", s, [[0.9, 0.1], [0.5, 0.8]]) for s in range(8)]
    results += [make_result("replay", s, [[0.9, 0.1], [0.5 + 0.01 * (s + 1), 0.8]]) for s in range(8)]
    row = by_name(results)["replay"]
    assert row.p_holm == pytest.approx(2 / 2**8)
    assert row.test == "p = 0.008"
    assert row.is_significant


def test_another_reference_or_none(runs):
    assert by_name(runs, reference="replay")["naive"].difference.mean == pytest.approx(-0.15)
    rows = by_name(runs, reference="ewc")
    assert all(row.test == "" and not row.difference.is_defined for row in rows.values())
    assert not any(row.is_reference for row in by_name(runs, reference="lwf").values())


def test_without_a_seed_in_common_there_is_no_test(make_result):
    row = by_name([make_result("naive", 0), make_result("replay", 1)])["replay"]
    assert row.test == "no seed in common"
    assert not row.difference.is_defined


def test_losses_rank_the_other_way(make_result):
    results = [
        make_result("naive", 0, [[2.0, 4.0], [3.0, 2.0]], measure="loss", R_init=[4.0, 4.0]),
        make_result("replay", 0, [[2.0, 4.0], [2.5, 2.0]], measure="loss", R_init=[4.0, 4.0]),
    ]
    first, second = comparison_rows(results)
    assert (first.strategy, second.strategy) == ("replay", "naive")
    assert first.difference.mean == pytest.approx(-0.25)
    assert second.metrics["forgetting_max"].mean == pytest.approx(1.0)
    assert second.metrics["bwt"].mean == pytest.approx(1.0)
    signs = {metric.key: metric.sign for metric in metrics_of("loss")}
    assert signs == {"final": -1, "average": -1, "learning": -1, "forgetting_max": -1, "bwt": -1}


def test_rows_of_several_sections_name_theirs(make_result):
    rows = comparison_rows([make_result(), make_result(stream="other")])
    assert [row.section for row in rows] == ["toy · mlp", "other · mlp"]


def test_table_as_text(runs):
    heads, cells = table_text(comparison_rows(runs))
    assert heads[:3] == ["Strategy", "Seeds", "Final accuracy (%)"]
    assert [line[0] for line in cells] == ["joint", "replay", "naive"]
    naive = dict(zip(heads, cells[2], strict=True))
    assert naive["Final accuracy (%)"] == "65.0 [60.0, 70.0]"
    assert naive["BWT (%)"] == "−35.0 [−40.0, −30.0]"
    assert naive["Difference to naive"] == "–"
    assert dict(zip(heads, cells[1], strict=True))["Kept"] == "2 KiB"
    assert table_text([]) == ([], [])
