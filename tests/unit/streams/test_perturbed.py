"""Perturbations against their formulas, pixel by pixel or by their moments; and experiences of SCoLe that use them."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

from cl.core import UserError
from streams._perturbed import PERTURBATIONS, disk, kinds_for, perturbed
from streams.scole import scole


def draws():
    return torch.Generator().manual_seed(0)


def pictures(channels=1, num=3, side=12):
    return torch.randint(256, (num, channels, side, side), dtype=torch.uint8, generator=draws())


def noisy(kind, severity, level=128, largest=255):
    """100,000 pixels of one grey, in [0, 1]."""
    raw = torch.full((10, 1, 100, 100), level, dtype=torch.uint8)
    return perturbed(raw, kind, severity, draws(), largest).double() / largest


def test_noise_has_the_published_moments():
    x = 128 / 255
    assert noisy("gaussian_noise", 2).std().item() == pytest.approx(0.08, rel=0.02)
    assert noisy("gaussian_noise", 2).mean().item() == pytest.approx(x, abs=0.002)
    assert noisy("shot_noise", 3).var().item() == pytest.approx(x / 50, rel=0.03)
    assert noisy("shot_noise", 3).mean().item() == pytest.approx(x, abs=0.002)
    assert noisy("speckle_noise", 1).std().item() == pytest.approx(0.15 * x, rel=0.02)
    salted = noisy("impulse_noise", 4)
    assert (salted == 0).double().mean().item() == pytest.approx(0.04, rel=0.1)
    assert (salted == 1).double().mean().item() == pytest.approx(0.04, rel=0.1)
    assert torch.equal(salted[(salted != 0) & (salted != 1)].unique(), torch.tensor([x], dtype=torch.float64))
    # images that store 16 as white, as the digits, are perturbed as much
    assert noisy("gaussian_noise", 2, level=8, largest=16).std().item() == pytest.approx(0.082, rel=0.05)


def test_gaussian_blur_of_a_point_is_a_gaussian():
    raw = torch.zeros(1, 1, 21, 21, dtype=torch.uint8)
    raw[0, 0, 10, 10] = 255
    found = perturbed(raw, "gaussian_blur", 3, draws())[0, 0].tolist()
    weights = [math.exp(-(d**2) / 2) for d in range(-4, 5)]
    for y in range(21):
        for x in range(21):
            far = max(abs(y - 10), abs(x - 10)) > 4
            value = 0 if far else 255 * weights[y - 6] * weights[x - 6] / sum(weights) ** 2
            assert found[y][x] == round(value)


def test_defocus_is_the_mean_over_a_disk():
    raw, radius = pictures(side=9), 3
    found = perturbed(raw, "defocus_blur", 5, draws())
    offsets = [(y, x) for y in range(-3, 4) for x in range(-3, 4) if y**2 + x**2 <= radius**2]

    def mirrored(i):
        return abs(i) if i < 9 else 16 - i

    for y, x in ((0, 0), (4, 4), (8, 2)):
        near = [int(raw[1, 0, mirrored(y + dy), mirrored(x + dx)]) for dy, dx in offsets]
        assert abs(int(found[1, 0, y, x]) - sum(near) / len(near)) <= 0.51
    assert disk(0.5, 0.6).sum().item() == pytest.approx(1)


def test_zoom_is_the_mean_of_enlarged_images():
    """A ramp about the centre grows by the factors: of an image that is linear, the blur is linear but at borders."""
    side, start = 41, 100
    ramp = (start + (torch.arange(side) - side // 2)).clamp(0, 255).to(torch.uint8)
    raw = ramp.expand(1, 1, side, side).contiguous()
    found = perturbed(raw, "zoom_blur", 5, draws())[0, 0, 20]
    slope = (int(found[35]) - int(found[5])) / 30
    factors = [1 + 0.01 * i for i in range(26)]
    assert slope == pytest.approx((1 + sum(1 / f for f in factors)) / (1 + len(factors)), abs=0.03)
    constant = torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(perturbed(constant, "zoom_blur", 1, draws()), constant)


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast(channels):
    raw = pictures(channels)
    found = perturbed(raw, "contrast", 2, draws())
    for n in range(3):
        for c in range(channels):
            pixels = [int(v) for v in raw[n, c].flatten()]
            mean = sum(pixels) / len(pixels)
            wanted = [mean + 0.3 * (pixel - mean) for pixel in pixels]
            assert max(abs(a - b) for a, b in zip(found[n, c].flatten().tolist(), wanted, strict=True)) <= 0.51


@pytest.mark.parametrize(
    ("kind", "severity"), [("brightness", 1), ("brightness", 4), *(("saturate", s) for s in (1, 2, 3, 5))]
)
def test_colours_through_hue_saturation_value(kind, severity):
    raw = pictures(3, num=1)
    raw[0, :, 0, 0] = 0
    raw[0, :, 0, 1] = 90
    found = perturbed(raw, kind, severity, draws())
    factor, more = {1: (0.3, 0), 2: (0.1, 0), 3: (2, 0), 5: (30, 0.2)}.get(severity, (1, 0))
    for y in range(12):
        for x in range(12):
            h, s, v = colorsys.rgb_to_hsv(*(raw[0, :, y, x].double() / 255).tolist())
            if kind == "brightness":
                v = min(1, v + 0.1 * severity)
            else:
                s = min(1, s * factor + more)
            wanted = [255 * value for value in colorsys.hsv_to_rgb(h, s, v)]
            assert max(abs(a - b) for a, b in zip(found[0, :, y, x].tolist(), wanted, strict=True)) <= 0.51


def test_grey_images_have_no_saturation():
    assert set(kinds_for(3)) - set(kinds_for(1)) == {"saturate"} and len(kinds_for(3)) == len(PERTURBATIONS) + 1


@pytest.mark.parametrize("kind", ["none", *PERTURBATIONS])
def test_stored_images_are_not_touched(kind):
    raw = pictures(3)
    before = raw.clone()
    found = perturbed(raw, kind, 5, draws())
    assert torch.equal(raw, before) and found.dtype == torch.uint8 and found.shape == raw.shape
    assert torch.equal(found, perturbed(raw, kind, 5, draws()))


# experiences of SCoLe


def rows_of(experience):
    data = experience.load()
    return data.rows(torch.arange(len(data)))


def test_experiences_are_perturbed_by_what_their_names_say():
    clean, stream = (scole("digits", 60, rows_per_class=10, **options) for options in ({}, CHANGED))
    kinds = set()
    for plain, changed in zip(clean.experiences, stream.experiences, strict=True):
        was, now = rows_of(plain), rows_of(changed)
        kind = changed.name.removeprefix(plain.name)
        kinds.add(kind.strip(", ").split(" ")[0])
        assert plain.domain == changed.domain == plain.name
        assert torch.equal(was.targets, now.targets) and torch.equal(was.sample_ids, now.sample_ids)
        assert torch.equal(was.experience_id, now.experience_id)
        if not kind.startswith(", zoom_blur"):  # which leaves 8x8 pixels alone while factors are small
            assert torch.equal(was.inputs, now.inputs) == (kind == "")
        assert torch.equal(now.inputs, rows_of(changed).inputs)
        assert torch.equal(changed.load().rows(torch.tensor([7, 2])).inputs, now.inputs[[7, 2]])
    assert {"", "contrast", "shot_noise"} <= kinds and "saturate" not in kinds
    held_out = [eval_set.load().rows(torch.arange(5)).inputs for eval_set in (clean.eval_sets[0], stream.eval_sets[0])]
    assert torch.equal(*held_out)


CHANGED = {"perturbation": "random", "severity": "random"}


def test_one_perturbation_for_all():
    stream = scole("digits", 4, rows_per_class=10, perturbation="contrast", severity=3)
    assert all(experience.name.endswith(", contrast 3") for experience in stream.experiences)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"perturbation": "rain"}, "stream.perturbation is 'rain'; it must be one of random, none, gaussian_noise"),
        ({"perturbation": "saturate"}, "stream.perturbation is 'saturate'; it must be one of random, none"),
        (
            {"perturbation": "random", "severity": 6},
            "stream.severity is 6; it must be an integer from 1 to 5, or random",
        ),
        ({"severity": 2}, "stream.severity is 2, which nothing has while stream.perturbation is 'none'"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence):
    with pytest.raises(UserError) as found:
        scole("digits", 5, **options)
    assert str(found.value).startswith(sentence)
