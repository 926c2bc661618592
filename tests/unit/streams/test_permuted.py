"""Permuted images: one bijection per experience, for training and measuring alike."""

import pytest
import torch

from cl.core import UserError
from streams._images import load_images
from streams._remap import remap
from streams.permuted import permutation, permuted


def columns_of(plain, shown):
    """For each shown pixel the plain pixels that equal it in every image."""
    plain, shown = plain.flatten(1), shown.flatten(1)
    return (plain[:, :, None] == shown[:, None, :]).all(0)


@pytest.mark.parametrize("first_identity", [False, True])
def test_training_and_measuring_share_one_bijection(data_root, first_identity):
    """Found from the pixels themselves: in random images no two pixels are equal throughout."""
    whole = load_images("mnist", data_root)
    stream = permuted("mnist", 3, first_identity=first_identity, root=data_root)
    for k in range(3):
        train, held_out = stream.experiences[k].load(), stream.eval_sets[k].load()
        match = columns_of(whole.inputs[:40], train.shown[:40])
        assert match.sum(0).tolist() == [1] * 784
        assert match.sum(1).tolist() == [1] * 784
        source = match.int().argmax(0)
        assert torch.equal(held_out.shown.flatten(1), whole.eval_inputs.flatten(1)[:, source])
        assert torch.equal(source, torch.arange(784)) == (first_identity and k == 0)
        assert torch.equal(train.targets, whole.targets)
        assert torch.equal(held_out.targets, whole.eval_targets)


def test_every_experience_and_seed_has_its_own():
    shown = [permuted("digits", 3, seed=s).experiences[k].load().shown for s in (0, 1) for k in range(3)]
    assert len({images.numpy().tobytes() for images in shown}) == 6


def test_pure_function_of_seed_and_experience():
    short, long = permuted("digits", 2, seed=5), permuted("digits", 9, "task_incremental", seed=5)
    last = long.eval_sets[8].load()
    assert torch.equal(short.experiences[1].load().shown, long.experiences[1].load().shown)
    assert torch.equal(last.shown, long.eval_sets[8].load().shown)


def test_first_identity_leaves_the_others_alone():
    plain, identity = permuted("digits", 2, seed=5), permuted("digits", 2, first_identity=True, seed=5)
    assert torch.equal(plain.experiences[1].load().shown, identity.experiences[1].load().shown)


def test_padding_comes_before_permuting():
    """As in the hypernetwork papers: border pixels are permuted too, so the border is no longer blank."""
    inputs = permuted("digits", 1, pad=2).experiences[0].load().shown
    assert inputs.shape[1:] == (1, 12, 12)
    assert inputs.sum() == load_images("digits").inputs.sum()
    assert inputs[:, :, :2].any()


@pytest.mark.parametrize(("setting", "num_heads"), [("domain_incremental", 1), ("task_incremental", 4)])
def test_heads_and_task_labels(setting, num_heads):
    stream = permuted("digits", 4, setting)
    assert stream.info.num_heads == num_heads
    assert stream.info.num_outputs == 10
    for k, (experience, eval_set) in enumerate(zip(stream.experiences, stream.eval_sets, strict=True)):
        task_id = k if num_heads > 1 else None
        assert experience.task_id == task_id
        for batch in (experience.load().rows(torch.arange(3)), eval_set.load().rows(torch.arange(3))):
            assert batch.experience_id.tolist() == [k] * 3
            assert (batch.task_id is None) if task_id is None else batch.task_id.tolist() == [k] * 3


def test_permutation_is_a_bijection():
    for seed in range(20):
        assert permutation(784, seed).sort().values.equal(torch.arange(784))


def test_augmenting_permuted_pixels_is_refused():
    with pytest.raises(UserError, match=r"stream\.augment moves images by a few pixels"):
        permuted("digits", augment="crop")


@pytest.mark.parametrize("num_channels", [1, 3])
def test_remap_equals_a_plain_loop(num_channels):
    inputs = torch.randint(256, (5, num_channels, 4, 6), dtype=torch.uint8)
    source = torch.randint(-1, 24, (24,))
    moved = remap(inputs, source)
    for n in range(5):
        for c in range(num_channels):
            plain = inputs[n, c].flatten()
            expected = [0 if s < 0 else plain[s].item() for s in source.tolist()]
            assert moved[n, c].flatten().tolist() == expected
