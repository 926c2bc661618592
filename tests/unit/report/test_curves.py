import math

import numpy as np
import pytest

from cl.report.curves import view
from cl.report.load import sections


def view_of(results, **options):
    (section,) = sections(results)
    return view(section, **options)


def test_average_over_seen_domains(runs):
    naive = view_of(runs).find("naive")
    assert naive.average.x == [1, 2]
    assert naive.average.mean == pytest.approx([0.85, 0.65])
    assert naive.average.low == pytest.approx([0.8, 0.6])
    assert naive.average.high == pytest.approx([0.9, 0.7])


def test_joint_is_a_bound_and_everything_in_it_counts_as_seen(runs):
    joint = view_of(runs).find("joint")
    assert joint.is_bound
    assert joint.average.mean == pytest.approx([0.925])
    assert joint.matrices[0].seen.all()
    assert not view_of(runs).find("naive").is_bound


def test_joint_alone_is_no_bound(runs):
    assert not view_of([run for run in runs if run.label == "joint"]).find("joint").is_bound


def test_mean_matrix_and_seeds(runs):
    mean, first, second = view_of(runs).find("naive").matrices
    assert [mean.name, first.name, second.name] == ["mean of 2 seeds", "seed 0", "seed 1"]
    np.testing.assert_allclose(mean.R, [[0.85, 0.1], [0.5, 0.8]])
    assert mean.seen.tolist() == [[True, False], [True, True]]


def test_a_domain_counts_as_seen_once_every_seed_was_taught_it(make_result):
    results = [make_result("naive", 0), make_result("naive", 1, trained=[1, 0])]
    assert view_of(results).find("naive").matrices[0].seen.tolist() == [[False, False], [True, True]]


def test_seen_is_what_the_average_is_over(make_result):
    # everything at once, then one domain at a time
    run = make_result(R=[[0.4, 0.6], [0.9, 0.2], [0.6, 0.8]], experiences=["all", "a", "b"], trained=[-1, 0, 1])
    naive = view_of([run]).find("naive")
    assert naive.matrices[0].seen.tolist() == [[True, True], [True, False], [True, True]]
    assert naive.average.mean == pytest.approx([0.5, 0.9, 0.7])


def test_curves_of_domains(runs):
    first, second = view_of(runs).find("replay").curves
    assert first.mean == pytest.approx([0.85, 0.75])
    assert second.high == pytest.approx([0.1, 0.9])


def test_losses_start_before_training(make_result):
    run = make_result(R=[[2.0, 4.0], [3.0, 2.0]], measure="loss", R_init=[4.0, 5.0])
    first, second = view_of([run]).find("naive").curves
    assert first.x == [0, 1, 2]
    assert first.mean == [4.0, 2.0, 3.0]
    assert second.mean == [5.0, 4.0, 2.0]


def test_cells_that_were_not_evaluated_stay_undefined(make_result):
    naive = view_of([make_result("naive", s, [[0.9, None], [0.6, 0.8]]) for s in (0, 1)]).find("naive")
    assert math.isnan(naive.matrices[0].R[0, 1])
    assert math.isnan(naive.curves[1].mean[0])
    assert naive.average.mean == pytest.approx([0.9, 0.7])


def test_partial_runs_are_shown_where_none_finished(runs):
    ewc = view_of(runs).find("ewc")
    assert ewc.average.x == [1]
    assert ewc.matrices[0].name == "seed 0 (failed)"
    assert not ewc.is_bound


def test_runs_without_any_row_are_in_the_rows_only(make_result):
    made = view_of([make_result(R=[], status="failed", error="no data")])
    assert made.strategies == []
    assert [row.num_failed for row in made.rows] == [1]


def test_front_leaves_joint_out(runs):
    fronts = {strategy.label: strategy.fronts for strategy in view_of(runs).strategies}
    assert fronts["naive"] == fronts["replay"] == {"passes", "buffer_bytes"}
    assert fronts["joint"] == fronts["ewc"] == frozenset()


def test_many_domains_get_no_bands_but_means(make_result):
    rng = np.random.default_rng(0)
    results = [make_result("naive", s, rng.uniform(size=(13, 13)).tolist()) for s in (0, 1)]
    curve = view_of(results).find("naive").curves[4]
    assert curve.mean == pytest.approx([(results[0].R[i][4] + results[1].R[i][4]) / 2 for i in range(13)])
    assert np.isnan(curve.low).all()
