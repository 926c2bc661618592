"""Rows, padding, standardising and augmenting, the same for every image stream."""

import inspect
from functools import partial

import pytest
import torch
import torchvision.transforms.functional as tv

from cl.core import UserError
from streams._augment import crop
from streams._images import load_images
from streams._options import open_images
from streams._rows import stratified_order
from streams.permuted import permuted
from streams.rotated import rotated
from streams.split import split

FAMILIES = (permuted, rotated, split)


def rows(inputs):
    """Images as a set of byte strings; the digits repeat none."""
    return {image.numpy().tobytes() for image in inputs}


def test_default_uses_the_data_set_as_it_is():
    images, whole = open_images("digits"), load_images("digits")
    assert images.inputs is whole.inputs
    assert images.eval_inputs is whole.eval_inputs


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_rows_are_training_rows_that_are_not_trained_on(seed):
    whole = load_images("digits")
    images = open_images("digits", seed, eval_on="validation", validation_frac=0.2)
    train, held_out = rows(images.inputs), rows(images.eval_inputs)
    assert not train & held_out
    assert train | held_out == rows(whole.inputs)
    assert not held_out & rows(whole.eval_inputs)
    assert len(images.eval_targets) == round(0.2 * len(whole.targets))
    share = images.eval_targets.bincount() / whole.targets.bincount()
    assert share.min() > 0.19
    assert share.max() < 0.21


def test_validation_never_depends_on_how_many_rows_are_trained_on():
    few = open_images("digits", eval_on="validation", train_rows=50)
    many = open_images("digits", eval_on="validation", train_rows=500)
    assert torch.equal(few.eval_inputs, many.eval_inputs)
    assert rows(few.inputs) < rows(many.inputs)


def test_limits_are_at_most_and_keep_every_class():
    images = open_images("digits", train_rows=10, eval_rows=20)
    assert images.targets.sort().values.tolist() == list(range(10))
    assert set(images.eval_targets.bincount().tolist()) <= {1, 2, 3}
    assert len(images.eval_targets) == 20
    assert len(open_images("digits", train_rows=10**6).targets) == 1437


def test_rows_are_drawn_by_seed():
    draws = [rows(open_images("digits", seed, train_rows=100).inputs) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_stratified_order_keeps_shares_in_every_first_part():
    targets = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)[torch.randperm(1000)]
    order = stratified_order(targets, seed=3)
    assert order.sort().values.equal(torch.arange(1000))
    for n in range(10, 1000, 37):
        counts = targets[order[:n]].bincount(minlength=3)
        assert ((counts - n * torch.tensor([0.6, 0.3, 0.1])).abs() <= 1).all()


def test_ties_prefer_no_class():
    targets = torch.arange(100) % 10
    firsts = {targets[stratified_order(targets, seed)[0]].item() for seed in range(40)}
    assert len(firsts) > 5


def test_padding_adds_zeros_around():
    plain, padded = open_images("digits"), open_images("digits", pad=2)
    assert padded.shape == (1, 12, 12)
    assert torch.equal(padded.eval_inputs[:, :, 2:-2, 2:-2], plain.eval_inputs)
    assert padded.inputs.sum() == plain.inputs.sum()


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
def test_pixels_are_in_the_unit_interval_or_standardised(data_root, dataset):
    images = open_images(dataset, root=data_root)
    unit = images.transform(images.inputs)
    assert unit.dtype == torch.float32
    assert unit.min() == 0
    assert unit.max() == 1
    standard = open_images(dataset, root=data_root, standardise=True).transform(images.inputs)
    assert standard.mean((0, 2, 3)).abs().max() < 1e-4
    assert (standard.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_statistics_are_of_the_whole_training_rows_unpadded():
    plain = open_images("digits", standardise=True)
    other = open_images("digits", standardise=True, pad=2, train_rows=100, eval_on="validation")
    probe = plain.inputs[:5]
    assert torch.equal(plain.transform(probe), other.transform(probe))


@pytest.mark.parametrize("flip", [False, True])
def test_crop_is_torchvisions_shift_of_the_padded_image(flip):
    inputs = torch.rand(150, 1, 9, 7)
    out = crop(inputs, torch.Generator().manual_seed(0), torch.zeros(1, 1, 1, 1), flip)
    found = set()
    for image, result in zip(inputs, out, strict=True):
        padded = tv.pad(image, 4)
        options = {
            (top, left, mirror): tv.hflip(tv.crop(padded, top, left, 9, 7))
            if mirror
            else tv.crop(padded, top, left, 9, 7)
            for top in range(9)
            for left in range(9)
            for mirror in (False, True)
        }
        matching = [key for key, option in options.items() if torch.equal(option, result)]
        assert len(matching) == 1
        found.add(matching[0])
    assert {top for top, _, _ in found} == set(range(9)) == {left for _, left, _ in found}
    assert {mirror for _, _, mirror in found} == ({False, True} if flip else {False})


def test_what_is_shifted_in_is_black_after_the_transform(data_root):
    images = open_images("cifar10", root=data_root, standardise=True, augment="crop_flip")
    raw = images.inputs[:16]
    after = images.augment(images.transform(raw), torch.Generator().manual_seed(1))
    before = crop(raw.float(), torch.Generator().manual_seed(1), torch.zeros(1, 3, 1, 1), flip=True)
    torch.testing.assert_close(after, images.transform(before.to(torch.uint8)))


def test_augmentation_is_a_function_of_its_generator(data_root):
    stream = split("cifar10", augment="crop", root=data_root)
    batch = stream.experiences[0].load().rows(torch.arange(8))
    one, same, other = (stream.prepare(batch, torch.Generator().manual_seed(s)).inputs for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(stream.prepare(batch).inputs, stream.transform(batch.inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_signature_lists_own_and_shared_options_once(family):
    names = list(inspect.signature(family).parameters)
    assert names[0] == "dataset"
    assert len(names) == len(set(names))
    assert {"seed", "setting", "num_experiences", *inspect.signature(open_images).parameters} <= set(names)
    assert family.__name__ == family.__module__.rsplit(".", 1)[-1]
    with pytest.raises(TypeError, match="colour"):
        family("digits", colour="red")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "mnits"}, "stream.dataset is 'mnits'; it must be one of cifar10, cifar100, digits,"),
        ({"dataset": ["mnist"]}, "stream.dataset is"),
        ({"eval_on": "train"}, "stream.eval_on is 'train'; it must be one of test, validation"),
        ({"augment": "mixup"}, "stream.augment is 'mixup'; it must be one of none, crop, crop_flip"),
        ({"pad": -1}, "stream.pad is -1; it must be an integer of at least 0"),
        ({"standardise": "yes"}, "stream.standardise is 'yes'; it must be true or false"),
        ({"train_rows": 0}, "stream.train_rows is 0; it must be an integer of at least 1"),
        ({"eval_rows": 9}, "stream.eval_rows is 9; it must be at least 10, one row of each class of digits"),
        ({"train_rows": "half"}, "stream.train_rows is 'half'"),
        ({"validation_frac": 1.5}, "stream.validation_frac is 1.5; it must be a number between 0 and 1"),
        ({"eval_on": "validation", "validation_frac": 0.001}, "holds out 1 of 1437 rows of digits"),
        ({"eval_on": "validation", "validation_frac": 0.999}, "holds out 1436 of 1437 rows"),
        ({"setting": "online"}, "stream.setting is 'online'; it must be one of"),
        ({"num_experiences": 0}, "stream.num_experiences is 0; it must be an integer of at least 1"),
        ({"num_experiences": 2.5}, "stream.num_experiences is 2.5"),
        ({"num_experiences": True}, "stream.num_experiences is True"),
    ],
)
def test_wrong_options_are_one_sentence(family, options, says):
    with pytest.raises(UserError) as caught:
        family(**options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", [permuted, rotated, partial(split, num_experiences=5)])
def test_validation_and_limits_reach_the_stream(family):
    stream = family("digits", eval_on="validation", train_rows=200, eval_rows=50)
    experience, eval_set = stream.experiences[0], stream.eval_sets[0]
    assert len(experience.load()) == experience.num_samples <= 200
    assert len(eval_set.load()) == eval_set.num_samples <= 50
