"""The numbers that papers give for MNIST, on MNIST."""

import pytest
import torch

from streams._images import load_images
from streams._options import open_images
from streams.permuted import permuted
from streams.split import split

pytestmark = pytest.mark.slow


def test_sizes_and_class_counts(real_root):
    stream = split("mnist", root=real_root)
    assert [e.num_samples for e in stream.experiences] == [12665, 12089, 11263, 12183, 11800]
    assert [e.num_samples for e in stream.eval_sets] == [2115, 2042, 1874, 1986, 1983]
    assert load_images("mnist", real_root).targets[:5].tolist() == [5, 0, 4, 1, 9]


def test_published_mean_and_deviation(real_root):
    transform = open_images("mnist", root=real_root, standardise=True).transform
    black, white = transform(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
    assert 1 / (white - black) == pytest.approx(0.3081, abs=5e-5)
    assert -black / (white - black) == pytest.approx(0.1307, abs=5e-5)


def test_hypernetwork_protocol_has_1024_inputs(real_root):
    stream = permuted("mnist", 10, first_identity=True, pad=2, root=real_root)
    assert stream.info.input_shape == (1, 32, 32)
    data = stream.experiences[9].load()
    assert data.shown.shape == (60000, 1, 32, 32)
    assert data.shown.sum() == load_images("mnist", real_root).inputs.sum()
