import struct
import subprocess
import sys

import numpy as np
import pytest

from cl.report.axes import DPI
from cl.report.curves import view
from cl.report.figures import comparison, cost, file_names, save_figures
from cl.report.load import sections
from cl.report.markdown import save_tables
from cl.report.matrix_figures import forgetting_curves, heatmap, value_range


def view_of(results):
    (section,) = sections(results)
    return view(section)


def png_size(path):
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])


def synthetic(make_result, T, labels=("naive", "replay"), seeds=2, measure="accuracy"):
    rng = np.random.default_rng(0)
    factor = 1 if measure == "accuracy" else 5
    return [
        make_result(label, seed, (factor * rng.uniform(size=(T, T))).tolist(), measure=measure)
        for label in labels
        for seed in range(seeds)
    ]


def test_files_and_their_sizes(tmp_path, runs):
    made = view_of(runs)
    paths = save_figures(made, tmp_path)
    assert [path.stem for path in paths] == [
        "comparison",
        "forgetting_curves",
        "cost",
        "accuracy_matrix_joint",
        "accuracy_matrix_replay",
        "accuracy_matrix_naive",
        "accuracy_matrix_ewc",
    ]
    for path, figure in zip(paths, (comparison(made), forgetting_curves(made), cost(made)), strict=False):
        assert png_size(path) == tuple(int(side * DPI) for side in figure.get_size_inches())
    for path in paths:
        width, height = png_size(path)
        assert 300 < width < 3000
        assert 300 < height < 3000
        assert path.stat().st_size > 3000


@pytest.mark.parametrize(("T", "measure"), [(1, "accuracy"), (1, "loss"), (3, "loss"), (13, "loss"), (150, "accuracy")])
def test_any_number_of_experiences(tmp_path, make_result, T, measure):
    results = synthetic(make_result, T, labels=["naive"], seeds=1, measure=measure)
    results.append(make_result("joint", 0, [results[0].R[0]], measure=measure, experiences=["all"], trained=[-1]))
    for path in save_figures(view_of(results), tmp_path):
        assert max(png_size(path)) < 3000


def test_a_single_run_has_one_heatmap(tmp_path, make_result):
    assert "accuracy_matrix" in [path.stem for path in save_figures(view_of([make_result("derpp")]), tmp_path)]


def test_a_heatmap_is_named_after_what_it_shows(tmp_path, make_result):
    made = view_of([make_result(name, measure="loss") for name in ("naive", "replay")])
    names = {path.stem for path in (*save_figures(made, tmp_path), *save_tables(made, tmp_path))}
    assert {name for name in names if "matrix" in name} == {"loss_matrix", "loss_matrix_naive", "loss_matrix_replay"}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_values_are_printed_and_unseen_cells_pale(make_result):
    made = view_of([make_result()])
    axes = heatmap(made, made.strategies[0]).axes[0]
    assert texts(axes) == ["90.0", "10.0", "60.0", "80.0"]
    alpha = axes.images[0].get_alpha()
    assert alpha[0, 0] == alpha[1, 0] == alpha[1, 1] == 1
    assert alpha[0, 1] < 0.5


def test_values_are_not_printed_when_there_are_many(make_result):
    made = view_of(synthetic(make_result, 13))
    assert texts(heatmap(made, made.strategies[0]).axes[0]) == []


def test_dark_is_better_for_both_measures(make_result):
    def darkness(measure, value):
        R = [[1.0, 0.0], [0.5, 0.5]]
        made = view_of([make_result(R=R, measure=measure)])
        image = heatmap(made, made.strategies[0]).axes[0].images[0]
        return -sum(image.cmap(image.norm(value * made.unit.factor))[:3])

    assert darkness("accuracy", 1.0) > darkness("accuracy", 0.5)
    assert darkness("loss", 0.5) > darkness("loss", 1.0)


def test_colours_of_losses_span_what_was_trained(make_result):
    made = view_of([make_result(R=[[2.0, 9.0], [3.0, 2.5]], measure="loss", R_init=[9.0, 9.0])])
    assert value_range(made) == (2.0, 3.0)


def test_many_domains_get_a_colour_bar_and_no_names(make_result):
    few, many = view_of(synthetic(make_result, 3)), view_of(synthetic(make_result, 13))
    assert len(forgetting_curves(few).axes) == 2
    assert len(forgetting_curves(many).axes) == 3
    assert texts(forgetting_curves(many).axes[0]) == []
    assert sorted(texts(forgetting_curves(few).axes[0])) == ["0", "1", "2"]


def test_names_with_markup_and_formulas_are_drawn_as_they_are(tmp_path, make_result):
    paths = save_figures(view_of([make_result(name) for name in ("<b>a/b</b>", "$\\frac$")]), tmp_path)
    assert len({path.name.lower() for path in paths}) == len(paths)
    assert all(path.parent == tmp_path for path in paths)


def test_file_names_are_distinct_whatever_the_file_system():
    names = file_names(["EWC", "ewc", "../../etc", "", "é"])
    assert len({name.lower() for name in names.values()}) == 5
    assert not any(set(name) & set('/\\:*?"<>|') for name in names.values())


def test_no_global_state_and_no_heavy_import():
    code = (
        "import sys, cl.report\n"
        "assert not {'matplotlib', 'torch', 'scipy', 'mlflow'} & set(sys.modules), sorted(sys.modules)\n"
        "import cl.report.figures, cl.report.html\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from cl.report.axes import new_figure, dress\n"
        "dress(new_figure(1, 1).add_subplot())\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_domains_are_numbered_from_zero_as_everywhere(make_result):
    figure = forgetting_curves(view_of([make_result("naive")]))
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0", "1"]
    # more than have room for names: the first column is number 0
    many = view_of([make_result("naive", R=np.full((60, 60), 0.5).tolist())])
    ticks = heatmap(many, many.strategies[0]).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks if tick.get_position()[0] == 0] == ["0"]
