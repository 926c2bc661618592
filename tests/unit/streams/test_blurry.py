"""Rows that change sides: every row once, the law of the ramp, and what is refused."""

import pytest
import torch

from cl.core import UserError
from streams.blurry import blurry, gradual, mixed
from streams.permuted import permuted
from streams.split import split

SIZES = [400, 300, 500]


@pytest.mark.parametrize("origins", [gradual, mixed])
@pytest.mark.parametrize("blur", [0.01, 0.3, 1.0])
def test_every_row_once_and_sizes_stay(origins, blur):
    places = origins(SIZES, blur, seed=1)
    assert [len(each) for each in places] == SIZES
    assert torch.cat(places).sort().values.tolist() == list(range(1200))


def test_the_ramp_is_linear():
    """At place p of the 2w around a boundary a row is of the new experience with probability (p + 1/2) / 2w."""
    width, repeats = 100, 400
    other = torch.zeros(2 * width)
    for seed in range(repeats):
        left, right = gradual([200, 200], 1.0, seed)
        row = torch.cat([left, right])[200 - width : 200 + width]
        other += (row >= 200).float()
    share = other / repeats
    expected = (torch.arange(2 * width) + 0.5) / (2 * width)
    z = (share - expected) / (expected * (1 - expected) / repeats).sqrt()
    assert z.abs().max() < 5
    # places of one half are independent, so this is a chi-square sum of 100 terms
    assert 60 < z[:width].square().sum() < 150


def test_the_narrowest_ramp_has_a_quarter_on_either_side():
    """Two places, at which a row is of the new experience with probability 1/4 and 3/4."""
    early = sum(int(gradual([2, 2], 1.0, seed)[0][1] >= 2) for seed in range(800))
    assert abs(early - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("sizes", [[20, 200], [200, 20]])
def test_the_smaller_neighbour_decides_the_width(sizes):
    left, right = gradual(sizes, 1.0, seed=0)
    assert (left[:-10] < sizes[0]).all() and (right[10:] >= sizes[0]).all()


@pytest.mark.parametrize(("blur", "given"), [(0.4, 6), (1.0, 15), (0.01, 1)])
def test_mixed_gives_as_many_to_each_of_the_others(blur, given):
    for k, places in enumerate(mixed([30, 30, 30], blur, seed=0)):
        expected = [given] * 3
        expected[k] = 30 - 2 * given
        assert (places // 30).bincount(minlength=3).tolist() == expected


def test_two_experiences_are_enough():
    stream = blurry(permuted("digits", 2))
    assert (stream.info.name, len(stream.experiences)) == ("gradual_permuted_digits", 2)


def test_rows_far_from_a_boundary_stay():
    left, right = gradual([200, 200], 0.2, seed=0)
    assert (left[:180] < 200).all()
    assert (right[20:] >= 200).all()
    assert (left[180:] >= 200).sum() == (right[:20] < 200).sum() > 0


def test_mixed_gives_and_takes_equal_parts():
    places = mixed([300, 300, 300, 300], 0.2, seed=0)
    owner = [(each // 300).bincount(minlength=4).tolist() for each in places]
    assert owner == [[240 if j == k else 20 for j in range(4)] for k in range(4)]


@pytest.mark.parametrize("kind", ["gradual", "mixed"])
def test_rows_keep_what_they_show(kind):
    base = permuted("digits", 3, train_rows=200)
    stream = blurry(base, kind, 0.5)
    whole = [e.load().rows(torch.arange(200)) for e in base.experiences]
    seen = set()
    for experience in stream.experiences:
        batch = experience.load().batch
        assert batch.experience_id.unique().tolist() == [experience.id]
        assert batch.sample_ids.tolist() == list(range(200))
        owners = set()
        for image, target in zip(batch.inputs, batch.targets, strict=True):
            found = [
                (j, i)
                for j, rows in enumerate(whole)
                for i in (rows.inputs == image).flatten(1).all(1).nonzero().flatten().tolist()
                if rows.targets[i] == target
            ]
            owners.add(found[0][0])
            seen.add(found[0])
        assert {base.experiences[j].domain for j in owners} <= set(experience.practises)
    assert len(seen) > 590


def test_gradual_rows_come_in_their_order():
    stream = blurry(split("digits"), blur=1.0)
    first = stream.experiences[0]
    assert first.order(20, 5, torch.Generator()).tolist() == list(range(20))
    classes = first.load().batch.targets
    new = (classes >= 2).float()
    assert new[: len(new) // 2].sum() == 0
    assert new[-30:].mean() > 0.2
    assert stream.trained_domains == [0, 1, 2, 3, 4]
    assert stream.practised_domains[0] == [0, 1]
    assert first.classes == (0, 1, 2, 3)


WRONG = [
    ({"blur": 0}, "stream.blur is 0; it must be above 0 and at most 1"),
    ({"blur": 1.1}, "stream.blur is 1.1; it must be above 0 and at most 1"),
    ({"kind": "soft"}, "stream.kind is 'soft'; it must be one of gradual, mixed"),
    (
        {"base": permuted("digits", 1)},
        "stream.base is permuted_digits with one experience; a boundary to blur needs two",
    ),
    (
        {"base": blurry(split("digits"))},
        "stream.base is gradual_split_digits, whose rows come in an order of their own",
    ),
    (
        {"base": permuted("digits", 12, train_rows=10), "kind": "mixed"},
        "stream.kind is 'mixed', and the smallest experience of permuted_digits has 10 rows",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as found:
        blurry(**({"base": split("digits")} | arguments))
    assert str(found.value).startswith(sentence)
