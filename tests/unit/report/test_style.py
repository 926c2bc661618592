import itertools
import json
import math
import shutil
import subprocess
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl.report.style import (
    NEUTRAL,
    OKABE_ITO,
    UNITS,
    beside,
    bytes_text,
    count_text,
    looks,
    p_text,
    seconds_text,
    short,
    shorts,
    spread,
)


def test_looks_are_distinct_fixed_and_neutral_for_the_bounds():
    labels = ["naive", "joint", *(f"strategy {k:02d}" for k in range(20))]
    found = looks(labels)
    assert found == looks(reversed(labels))
    assert {found[name].colour for name in NEUTRAL} == set(NEUTRAL.values())
    assert len({(look.colour, look.dash) for look in found.values()}) == len(labels)


def test_numbers_as_text():
    accuracy, loss = UNITS["accuracy"], UNITS["loss"]
    assert accuracy.text(0.8315) == "83.2"
    assert accuracy.text(-0.00001) == "0.0"
    assert accuracy.text(-0.05, signed=True) == "−5.0"
    assert accuracy.text(0.05, signed=True) == "+5.0"
    assert loss.text(2.34567) == "2.346"
    assert loss.text(None) == loss.text(math.nan) == "–"
    assert [count_text(v) for v in (0, 950, 1234567, math.nan)] == ["0", "950", "1.23 M", "–"]
    assert [bytes_text(v) for v in (0, 1023, 1024, 627200)] == ["0 B", "1023 B", "1 KiB", "612 KiB"]
    assert [seconds_text(v) for v in (0.5, 90.0, 125, 5025)] == ["0.5 s", "90 s", "2 min 05 s", "1 h 23 min"]
    assert [p_text(v) for v in (0.0001, 0.03125)] == ["< 0.001", "= 0.031"]
    assert short("class_balanced_replay", 10) == "class_…lay"


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
    frames = [(x, y - 5, x + 20, y + 5) for x, y in places]
    for a, b in itertools.combinations(frames, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_places_labels_by_the_same_rules():
    source = (files("cl.report") / "assets" / "draw.js").read_text()
    positions = [1.0, 1.0, 5.0, 5.5, 30.0, 35.2, 36.6, 39.0, 39.8]
    points = [(10, 20, 12), (12, 21, 20), (50, 50, 30), (0, 0, 9)]
    stub = "const document = {getElementById: () => ({namespaceURI: ''})};\n"
    call = f"""
    const points = {json.dumps([{"x": x, "y": -y, "width": w} for x, y, w in points])};
    const box = {{ left: 0, top: -100 + 10, right: 100, bottom: 0 }};
    const places = beside(points, box, 10, 4, []).flatMap((p) => [p.left, -p.middle]);
    console.log(JSON.stringify([spread({positions}, 2, 0, 40), places]));
    """
    done = subprocess.run(["node", "-e", stub + source + call], capture_output=True, text=True, check=True)
    found_spread, found_beside = json.loads(done.stdout)
    assert found_spread == pytest.approx(spread(positions, 2, 0, 40))
    ours = beside([(x, y) for x, y, _ in points], [w for *_, w in points], (0, 0, 100, 100), height=10, gap=4)
    assert found_beside == pytest.approx(list(itertools.chain(*ours)))


def test_texts_of_equal_costs_stand_in_a_column_of_their_own():
    # fifteen points nearer to each other than lines of text, at the right end of a box
    points = [(180.0, 20.0 + 8 * k) for k in range(15)]
    widths = [30.0 + 3 * k for k in range(15)]
    places = beside(points, widths, (0, 0, 200, 180), height=9, gap=5)
    for (left, middle), width in zip(places, widths, strict=True):
        assert left >= 0 and left + width < 180 - 5 and 0 < middle < 180
    middles = [middle for _, middle in places]
    assert min(b - a for a, b in itertools.pairwise(middles)) >= 9


def test_cut_names_stay_distinct():
    news = [f"a long domain name number {k} of the news" for k in range(5)]
    assert len(set(shorts(news, 16))) == 5
    assert all(str(k) in text and len(text) <= 16 for k, text in enumerate(shorts(news, 16)))
    assert shorts(["naive", "a_very_long_strategy_name_indeed"], 16) == [
        "naive",
        short("a_very_long_strategy_name_indeed", 16),
    ]
    assert len(set(shorts(["same long name of a domain"] * 2, 10))) == 1


def test_colours_are_seen_on_white_and_on_black():
    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in OKABE_ITO:
        assert 1.05 / (luminance(colour) + 0.05) > 2 and (luminance(colour) + 0.05) / 0.05 > 2
