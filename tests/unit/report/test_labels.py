"""Names are placed by the rules of `cl.report.labels`, in the figures and on the page alike."""

import itertools
import json
import shutil
import subprocess
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl.report.labels import beside, short, shorts, spread


@given(st.lists(st.floats(0, 100), max_size=12))
def test_spread_keeps_the_order_the_gap_and_the_range(positions):
    placed = spread(positions, gap=3, low=0, high=100)
    inside = sorted(placed)
    assert all(b - a >= 3 - 1e-6 for a, b in itertools.pairwise(inside))
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in placed)
    order = sorted(range(len(positions)), key=lambda i: (positions[i], i))
    assert [placed[i] for i in order] == inside


def test_spread_moves_the_neighbours_of_a_block_that_meets_the_end():
    # 97 and 100 are pushed down by the end, and so must be what lies below them
    assert spread([92, 94, 98, 100], gap=3, low=0, high=100) == [91, 94, 97, 100]


def test_spread_leaves_alone_what_does_not_touch():
    assert spread([1, 9, 5], gap=2) == [1, 9, 5]


def test_texts_beside_points_do_not_cover_each_other():
    places = beside([(50, 50), (50, 50), (52, 51)], [20, 20, 20], (0, 0, 100, 100), height=10, gap=4)
    frames = [(p.left, p.middle - 5, p.left + 20, p.middle + 5) for p in places]
    for a, b in itertools.combinations(frames, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_places_labels_by_the_same_rules():
    source = (files("cl.report") / "assets" / "labels.js").read_text()
    positions = [1.0, 1.0, 5.0, 5.5, 30.0, 35.2, 36.6, 39.0, 39.8]
    few = [(10.0, 20.0, 12.0), (12.0, 21.0, 20.0), (50.0, 50.0, 30.0), (0.0, 0.0, 9.0)]
    # columns that are crowded up to the top, in the middle with a lone point between them, and at the right end
    crowded = [(20.0, 99.0 - 4 * k, 10.0 + k) for k in range(8)] + [(60.0, 40.0, 20.0)]
    crowded += [(95.0, 3.0 + 2 * k, 30.0 - k) for k in range(6)]
    names = ["replay(capacity=20, lr=0.1)", "replay(capacity=50, lr=0.1)", "naive", "a_very_long_name_indeed"]
    asked = [[{"x": x, "y": -y, "width": width} for x, y, width in points] for points in (few, crowded)]
    call = f"""
    const box = {{ left: 0, top: -100, right: 100, bottom: 0 }};
    const obstacles = [[40, -80, 70, -60]];
    const flat = (p) => [p.left, -p.middle, p.hasLeader ? 1 : 0];
    const places = {json.dumps(asked)}.map((points) => beside(points, box, 10, 4, obstacles).flatMap(flat));
    console.log(JSON.stringify([spread({positions}, 2, 0, 40), ...places, cutAll({json.dumps(names)}, 12)]));
    """
    done = subprocess.run(["node", "-e", source + call], capture_output=True, text=True, check=True)
    found_spread, *found_places, found_names = json.loads(done.stdout)
    assert found_spread == pytest.approx(spread(positions, 2, 0, 40))
    for points, found in zip((few, crowded), found_places, strict=True):
        spots = [(x, y) for x, y, _ in points]
        ours = beside(spots, [width for *_, width in points], (0, 0, 100, 100), 10, 4, [(40, 60, 70, 80)])
        assert found == pytest.approx([number for p in ours for number in (p.left, p.middle, float(p.has_leader))])
    assert [place.has_leader for place in ours] == [True] * 8 + [False] + [True] * 6
    assert found_names == shorts(names, 12)


def test_texts_of_equal_costs_stand_in_a_column_of_their_own():
    # fifteen points nearer to each other than lines of text, at the right end of a box
    points = [(180.0, 20.0 + 8 * k) for k in range(15)]
    widths = [30.0 + 3 * k for k in range(15)]
    places = beside(points, widths, (0, 0, 200, 180), height=9, gap=5)
    for place, width in zip(places, widths, strict=True):
        assert place.has_leader and place.width == width
        assert place.left >= 0 and place.left + width < 180 - 5 and 0 < place.middle < 180
    middles = [place.middle for place in places]
    assert min(b - a for a, b in itertools.pairwise(middles)) >= 9


def test_cut_names_stay_distinct():
    assert short("class_balanced_replay", 10) == "class_…lay"
    news = [f"a long domain name number {k} of the news" for k in range(5)]
    assert len(set(shorts(news, 16))) == 5
    assert all(str(k) in text and len(text) <= 16 for k, text in enumerate(shorts(news, 16)))
    assert shorts(["naive", "a_very_long_strategy_name_indeed"], 16) == [
        "naive",
        short("a_very_long_strategy_name_indeed", 16),
    ]
    assert len(set(shorts(["same long name of a domain"] * 2, 10))) == 1
