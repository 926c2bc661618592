"""MNIST-360 against a plain re-derivation of mammoth's loaders, and turning against PIL."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cl.core import UserError
from streams._images import load_images
from streams._turned import turned
from streams.mnist360 import interleaved, mnist360, turns
from streams.rotated import rotation

# images of the digits 0 to 8 in MNIST's training set
MNIST_SIZES = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851]


def loaders(sizes, batch_size):
    """What mammoth's loop shows: (class, its slice, how many images of the class came before) for every image."""
    slices = {
        c: [list(range(n))[k * (n // 6 + 1) : (k + 1) * (n // 6 + 1)] for k in range(6)] for c, n in enumerate(sizes)
    }
    shown, pair, rounds, out = [0] * 9, [0, 1], 0, []
    while rounds < 3:
        active = [slices[c].pop() for c in pair]
        left = [len(part) for part in active]
        while left[0] > 0 and left[1] > 0:
            first = min(round(left[0] / (left[0] + left[1]) * batch_size), left[0])
            second = min(batch_size - first, left[1])
            for place, count in enumerate((first, second)):
                for _ in range(count):
                    out.append((pair[place], (active[place][0], active[place][-1]), shown[pair[place]]))
                    shown[pair[place]] += 1
                left[place] -= count
        pair = [(c + 1) % 9 for c in pair]
        rounds += pair[0] == 0
    return out


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("sizes", [MNIST_SIZES, [140, 150, 143, 149, 138, 152, 141, 144, 139]])
def test_pairs_slices_and_order_are_mammoth_s(sizes, batch_size):
    ours = []
    for turn in turns(sizes, batch_size):
        shown = list(turn.shown)
        for place in turn.order.tolist():
            part = turn.slices[place]
            ours.append((turn.classes[place], (part[0], part[-1]), shown[place]))
            shown[place] += 1
    assert ours == loaders(sizes, batch_size)


def test_the_larger_class_comes_alone_until_both_are_equal():
    assert interleaved(2, 5).tolist() == [1, 1, 1, 1, 0, 1]
    order = interleaved(300, 500, 16)
    assert order[:16].sum().item() == 10
    assert len(order) >= 790


def test_turning_is_pil_s():
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (120, 1, 28, 28), generator=generator, dtype=torch.uint8)
    angles = torch.cat([torch.rand(112, generator=generator, dtype=torch.float64) * 360, torch.arange(8) * 45.0])
    found = turned(images, angles)
    wanted = [np.asarray(Image.fromarray(i[0].numpy()).rotate(a)) for i, a in zip(images, angles.tolist(), strict=True)]
    # PIL counts in 1/65536 of a pixel
    assert (found[:, 0].numpy() != np.stack(wanted)).mean() < 2e-3
    for k, angle in ((114, 90), (116, 180), (118, 270)):
        assert (found[k, 0].numpy() == wanted[k]).all(), angle


def test_turning_is_that_of_rotated_images():
    image = load_images("digits").inputs[:1]
    for angle in (13.0, 77.7, 251.0):
        source = rotation(8, 8, angle)
        alone = image.flatten()[source.clamp(min=0)] * (source >= 0)
        assert torch.equal(turned(image, torch.tensor([angle])).flatten(), alone)


@pytest.mark.parametrize("has_boundaries", [False, True])
def test_images_turn_with_their_class(has_boundaries):
    """Turned back by the angle that the rule gives, an image shows mostly what one of its class showed."""
    images = load_images("digits")
    stream = mnist360("digits", has_boundaries=has_boundaries, shared_rows=1)
    whole = [e.load() for e in stream.experiences]
    inputs, targets = (torch.cat([getattr(data, name) for data in whole]) for name in ("inputs", "targets"))
    sizes = images.targets.bincount().tolist()[:9]
    shown = [0] * 9
    for row in range(0, 400):
        c = targets[row].item()
        angle = (c - 1) * 60 + shown[c] * 360 / sizes[c]
        shown[c] += 1
        pool = images.inputs[images.targets == c]
        again = turned(pool, torch.full((len(pool),), angle))
        assert (again == inputs[row]).flatten(1).all(1).any(), f"row {row}"


def test_without_boundaries_there_is_one_experience_in_its_order():
    one, many = mnist360("digits"), mnist360("digits", has_boundaries=True)
    assert len(one.experiences) == 1
    assert len(many.experiences) == 27
    assert one.experiences[0].num_samples == sum(e.num_samples for e in many.experiences)
    assert torch.equal(one.experiences[0].load().inputs, torch.cat([e.load().inputs for e in many.experiences]))
    order = one.experiences[0].order(50, 3, torch.Generator())
    assert order.tolist() == list(range(50))
    assert [e.name for e in many.experiences[7:10]] == ["digits 7 8", "digits 8 0", "digits 0 1"]
    assert many.practised_domains[8] == [0, 8]
    assert one.practised_domains == [list(range(9))]


def test_held_out_images_turn_once():
    stream, images = mnist360("digits"), load_images("digits")
    assert [e.domain for e in stream.eval_sets] == [f"digit {c}" for c in range(9)]
    data = stream.eval_sets[4].load()
    upright = images.eval_inputs[images.eval_targets == 4]
    assert len(data) == len(upright)
    assert (upright == data.inputs[0]).flatten(1).all(1).any(), "the first is not turned"
    half = turned(upright, torch.full((len(upright),), 360.0 * (len(upright) // 2) / len(upright)))
    assert (half == data.inputs[len(upright) // 2]).flatten(1).all(1).any()


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match=r"stream.dataset is digits with .* raise stream.train_rows"):
        mnist360("digits", train_rows=60)


def test_a_digit_without_held_out_images_has_no_column():
    """It was divided by their number when it was measured."""
    images = load_images("digits")
    targets = images.eval_targets.masked_fill(images.eval_targets == 3, 2)
    stream = mnist360.__wrapped__(replace(images, eval_targets=targets))
    assert [e.domain for e in stream.eval_sets] == [f"digit {c}" for c in range(9) if c != 3]
    assert [len(e.load()) for e in stream.eval_sets] == [e.num_samples for e in stream.eval_sets]


@pytest.mark.slow
def test_length_on_mnist(real_root):
    """54,051 images of nine digits; what a pair leaves over is not shown."""
    stream = mnist360("mnist", root=real_root)
    assert stream.info.name == "mnist360"
    assert 0.99 * 54_051 < stream.experiences[0].num_samples <= 54_051
