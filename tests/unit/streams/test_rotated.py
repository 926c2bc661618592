"""Rotated images: the angle of each experience, and the turn itself against two other implementations."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from cl.core import UserError
from streams._images import load_images
from streams._remap import remap
from streams.rotated import rotated, rotation

ANGLES = [0.0, 17.3, 45.0, 90.0, 123.4, 180.0, 270.0, 359.0]


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (1, 28, 20)])
def test_turn_is_torchvisions_and_pillows(shape, angle):
    image = torch.randint(256, (1, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = remap(image, rotation(*shape[1:], angle))
    pillow = torch.from_numpy(np.stack([np.array(Image.fromarray(c.numpy()).rotate(angle)) for c in image[0]]))
    for theirs in (tv.rotate(image, angle)[0], pillow):
        # single precision and 16-bit fixed point: a pixel on the edge between two may fall to the other side
        assert (ours[0] != theirs).float().mean() < 0.005


def test_four_quarter_turns_are_the_identity():
    source = rotation(5, 5, 90)
    assert source[source][source][source].tolist() == list(range(25))


def angle_of(stream, k):
    """The angle in whole degrees that reproduces the rows of experience k."""
    shown, plain = stream.experiences[k].load().shown[:20], load_images("digits").inputs[:20]
    return [a for a in range(360) if torch.equal(remap(plain, rotation(8, 8, a)), shown)]


def test_even_listed_and_first_angles():
    even = rotated("digits", 4, angles="even", angle_range=120.0)
    assert [k * 30 in angle_of(even, k) for k in range(4)] == [True] * 4
    listed = rotated("digits", 3, angles=[10, -30.0, 200], first_identity=True)
    assert [a in angle_of(listed, k) for k, a in enumerate((0, 330, 200))] == [True] * 3
    assert [experience.name for experience in listed.experiences] == [
        "rotation 00 by 0",
        "rotation 01 by -30",
        "rotation 02 by 200",
    ]


def test_random_angles_are_in_the_names_and_not_in_the_domains():
    """Runs of different seeds are compared column by column."""
    drawn = rotated("digits", 2, seed=1)
    assert [each.domain for each in drawn.eval_sets] == [each.domain for each in drawn.experiences]
    assert [each.domain for each in drawn.experiences] == ["rotation 00", "rotation 01"]
    assert drawn.experiences[0].name != rotated("digits", 2, seed=2).experiences[0].name


def test_random_angles_fill_the_range_and_pair_by_seed():
    def angles(seed, count=200, **options):
        names = [e.name for e in rotated("digits", count, seed=seed, **options).experiences]
        return torch.tensor([float(name.rsplit(" ", 1)[1]) for name in names])

    drawn = angles(0)
    assert drawn.min() >= 0
    assert drawn.max() <= 180
    assert abs(drawn.mean() - 90) < 12
    assert torch.equal(drawn[:7], angles(0, 7))
    assert not torch.equal(drawn, angles(1))
    assert angles(0, angle_range=10.0).max() <= 10
    assert torch.equal(angles(0, first_identity=True)[1:], drawn[1:])
    assert angles(0, first_identity=True)[0] == 0


def test_training_and_measuring_share_the_angle():
    stream, whole = rotated("digits", 2, angles=[90, 0], seed=3), load_images("digits")
    turned = stream.eval_sets[0].load().shown
    assert torch.equal(turned, tv.rotate(whole.eval_inputs, 90))
    assert torch.equal(stream.experiences[0].load().shown, tv.rotate(whole.inputs, 90))
    assert stream.eval_sets[1].load().shown is whole.eval_inputs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"angles": "both"}, "stream.angles is 'both'; it must be random, even, or a list of"),
        ({"angles": [1, 2]}, "stream.num_experiences=3 numbers"),
        ({"angles": [1, 2, "three"]}, "stream.angles is"),
        ({"angles": [1, 2, float("nan")]}, "stream.angles is"),
        ({"angles": 45}, "stream.angles is 45"),
        ({"angle_range": 0}, "stream.angle_range is 0; it must be in"),
        ({"angle_range": "wide"}, "stream.angle_range is 'wide'"),
        ({"angle_range": True}, "stream.angle_range is True; it must be in"),
        ({"first_identity": 1}, "stream.first_identity is 1; it must be true or false"),
        ({"setting": "class_incremental"}, "stream.setting is 'class_incremental'"),
    ],
)
def test_wrong_options_are_one_sentence(options, says):
    with pytest.raises(UserError) as caught:
        rotated("digits", 3, **options)
    assert says in str(caught.value)
