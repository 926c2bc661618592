import math

from cl.report.style import NEUTRAL, OKABE_ITO, UNITS, bytes_text, count_text, looks, p_text, seconds_text


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


def test_colours_are_seen_on_white_and_on_black():
    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in OKABE_ITO:
        assert 1.05 / (luminance(colour) + 0.05) > 2 and (luminance(colour) + 0.05) / 0.05 > 2
