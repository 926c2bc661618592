"""Files on disk become tensors, or one sentence."""

import gzip
import sys
from functools import partial

import numpy as np
import pytest
import torch

from cl.backbones.mlp import Mlp
from cl.core import UserError
from cl.trainer import Trainer
from strategies.naive import Naive
from streams._images import LOADERS, load_images, read_idx
from streams.split import split

LABELS = "train-labels-idx1-ubyte"
ARRAY = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images = load_images("digits")
    whole = load_digits()
    assert images.shape == (1, 8, 8)
    assert images.inputs.dtype == torch.uint8
    assert (len(images.targets), len(images.eval_targets)) == (1437, 360)
    assert torch.equal(images.eval_inputs[1, 0], torch.tensor(whole.images[5]).to(torch.uint8))
    assert images.eval_targets[1] == whole.target[5]


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_digits_need_scikit_learn_only_where_it_keeps_them_elsewhere(is_elsewhere, tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    whole = load_digits()
    if is_elsewhere:
        monkeypatch.setattr("sklearn.__spec__.submodule_search_locations", [str(tmp_path)])
    else:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    images = LOADERS["digits"](None, False)
    is_held_out = np.arange(1797) % 5 == 0
    for inputs, targets, rows in (
        (images.inputs, images.targets, ~is_held_out),
        (images.eval_inputs, images.eval_targets, is_held_out),
    ):
        assert np.array_equal(inputs[:, 0], whole.images[rows])
        assert np.array_equal(targets, whole.target[rows])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_is_read_as_written(tmp_path, idx, suffix):
    path = tmp_path / f"x-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(idx(ARRAY)) if suffix else idx(ARRAY))
    assert torch.equal(read_idx(path, 3), torch.from_numpy(ARRAY))


@pytest.mark.parametrize(
    ("name", "damaged", "says"),
    [
        ("x", lambda good: good[:-1], "announces 4 x 2 x 3 bytes, 23 are there"),
        ("x", lambda good: good + b"0", "announces 4 x 2 x 3 bytes, 25 are there"),
        ("x", lambda good: good[:10], "is not an idx file of unsigned bytes in 3 dimensions"),
        ("x", lambda good: b"", "is not an idx file"),
        ("x", lambda good: b"\0\0\x0d" + good[3:], "is not an idx file"),
        ("x", lambda good: good[:3] + b"\1" + good[4:], "in 3 dimensions"),
        ("x", lambda good: good[:4] + bytes(4) + good[8:16], "announces 0 x 2 x 3 bytes"),
        ("x.gz", lambda good: gzip.compress(good)[:-9], "cannot be unpacked"),
        ("x.gz", lambda good: good, "cannot be unpacked"),
        ("x.gz", lambda good: gzip.compress(good)[:12] + b"\xff" * 40, "cannot be unpacked"),
    ],
)
def test_damaged_idx_is_one_sentence_that_names_the_file(tmp_path, idx, name, damaged, says):
    (tmp_path / name).write_bytes(damaged(idx(ARRAY)))
    with pytest.raises(UserError, match=says) as caught:
        read_idx(tmp_path / name, 3)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mnist_is_read_plain_and_zipped(mnist_root, zipped_root):
    plain, zipped = (load_images("mnist", str(root)) for root in (mnist_root, zipped_root))
    assert plain.shape == (1, 28, 28)
    assert torch.equal(plain.inputs, zipped.inputs)
    assert torch.equal(plain.eval_targets, zipped.eval_targets)
    assert plain.targets.tolist() == [i % 10 for i in range(120)]


@pytest.mark.parametrize("name", sorted(set(LOADERS) - {"digits"}))
def test_absent_data_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match=r"needs data\.root"):
        load_images(name)
    with pytest.raises(UserError, match="not a folder"):
        load_images(name, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=f"data set {name} is not in {tmp_path}.*data.download=true"):
        load_images(name, str(tmp_path))


def test_missing_label_file_is_named(mnist_root):
    (mnist_root / "MNIST" / "raw" / LABELS).unlink()
    with pytest.raises(UserError, match=rf"no file {LABELS} or {LABELS}\.gz"):
        load_images("mnist", str(mnist_root))


@pytest.mark.parametrize("labels", [np.arange(119) % 10, np.arange(120) % 11])
def test_labels_that_do_not_fit_are_refused(mnist_root, idx, labels):
    (mnist_root / "MNIST" / "raw" / LABELS).write_bytes(idx(labels.astype(np.uint8)))
    with pytest.raises(UserError, match="one label from 0 to 9 per image"):
        load_images("mnist", str(mnist_root))


def test_images_of_two_sizes_are_refused(mnist_root, idx):
    file = mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(idx(np.zeros((60, 20, 20), np.uint8)))
    with pytest.raises(UserError, match="28 x 28 pixels to train on, and of 20 x 20 to measure on"):
        load_images("mnist", str(mnist_root))


def test_a_class_without_rows_is_refused_before_anything_is_trained(mnist_root, idx):
    """The experience that shows it was once refused when it was reached."""
    labels = np.arange(120) % 10
    (mnist_root / "MNIST" / "raw" / LABELS).write_bytes(idx(np.where(labels // 2 == 2, 0, labels).astype(np.uint8)))
    stream = split("mnist", root=str(mnist_root))
    assert [each.num_samples for each in stream.experiences] == [48, 24, 0, 24, 24]
    with pytest.raises(UserError, match=r"experience 2 \('classes 4 5'\) has no training rows"):
        Trainer(stream, Mlp, [Naive()], optimizer=partial(torch.optim.SGD, lr=0.1))


def test_a_class_without_held_out_rows_is_refused(mnist_root, idx):
    """Every metric of such a run was none."""
    file = mnist_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(idx((np.arange(60) % 8).astype(np.uint8)))
    with pytest.raises(UserError, match=r"experience 4 \('classes 8 9'\) has no rows of mnist to measure on"):
        split("mnist", root=str(mnist_root))


def test_foreign_cifar_is_not_unpickled(tmp_path, monkeypatch):
    """Files whose checksum is not the original's are refused before anything in them runs."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    monkeypatch.setattr("pickle.load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(UserError, match="not torchvision's originals"):
        load_images("cifar10", str(tmp_path))


def test_cifar_rows_become_channels_first(data_root):
    images = load_images("cifar10", data_root)
    assert images.inputs.shape == (100, 3, 32, 32)
    assert images.inputs.is_contiguous()
    first = np.random.default_rng(10).integers(256, size=(20, 3072)).astype(np.uint8)[0]
    assert torch.equal(images.inputs[0], torch.from_numpy(first).view(3, 32, 32))
    assert load_images("cifar100", data_root).num_classes == 100


def test_failed_download_is_one_sentence(tmp_path, monkeypatch):
    from torchvision import datasets

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "MNIST", fail)
    with pytest.raises(UserError, match=r"could not be downloaded .* no route to host"):
        load_images("mnist", str(tmp_path), download=True)


def test_home_folder_is_expanded(mnist_root, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist_root))
    assert len(load_images("mnist", "~").targets) == 120
