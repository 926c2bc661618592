"""Image data sets held as uint8 tensors: scikit-learn's digits (embedded) and torchvision's layouts under a root."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl.core import UserError


@dataclass(frozen=True)
class Images:
    """A labelled image data set.

    Args:
        inputs, eval_inputs: (N, channels, height, width) uint8.
        targets, eval_targets: (N,) int64.
        largest: pixel value that becomes 1.0.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    eval_inputs: Tensor
    eval_targets: Tensor
    num_classes: int
    largest: int = 255

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])


def scaled(raw: Tensor, largest: int) -> Tensor:
    """uint8 pixels -> float32 in [0, 1], in one pass."""
    return torch.mul(raw, 1.0 / largest)


@lru_cache(maxsize=4)
def load_images(name: str, root: str | None, download: bool = False) -> Images:
    """The data set `name`.

    Raises:
        UserError: unknown name, no root given, or files absent; the sentence names the folder and the files.
    """
    if name not in LOADERS:
        raise UserError(f"stream.dataset is {name!r}; the data sets are {', '.join(sorted(LOADERS))}")
    return LOADERS[name](root, download)


def _digits(root: str | None, download: bool) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; every fifth image is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(digits.target.astype(np.int64))
    held_out = torch.arange(len(targets)) % 5 == 0
    return Images(
        "digits", inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out], num_classes=10, largest=16
    )


def _mnist_like(root: str | None, download: bool, folder: str, name: str) -> Images:
    """Four idx files in torchvision's layout, `<root>/<folder>/raw/`, unpacked or gzipped."""
    path = _require_root(root, name) / folder / "raw"
    kinds = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    if download and not all(_idx_file(path, kind) for kind in kinds):
        _download(folder, root, name)
    tensors = []
    for kind in kinds:
        file = _idx_file(path, kind)
        if file is None:
            raise UserError(
                f"data set {name} is not in {path}: no file {kind}-ubyte or {kind}-ubyte.gz; put torchvision's "
                f"{folder} there, set data.root, or let it be downloaded with data.download=true"
            )
        tensors.append(_read_idx(file))
    inputs, targets, eval_inputs, eval_targets = tensors
    return Images(name, inputs.unsqueeze(1), targets.long(), eval_inputs.unsqueeze(1), eval_targets.long(), 10)


def _require_root(root: str | None, name: str) -> Path:
    if root is None:
        raise UserError(
            f"data set {name} needs data.root, the folder of torchvision's data sets, and it is not set"
        )
    if not Path(root).is_dir():
        raise UserError(f"data.root is {root!r}, which is not a folder; data set {name} is read from it")
    return Path(root)


def _idx_file(folder: Path, kind: str) -> Path | None:
    candidates = (folder / f"{kind}-ubyte", folder / f"{kind}-ubyte.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes: two zero bytes, type 8, number of dimensions, each dimension in 4 bytes, data."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an idx file of unsigned bytes; fetch it again")
    num_dims = content[3]
    shape = tuple(np.frombuffer(content, ">u4", num_dims, offset=4).tolist())
    if len(content) != 4 + 4 * num_dims + math.prod(shape):
        raise UserError(f"{path} is truncated: its header announces {shape}, {len(content)} bytes are there")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape).copy())


def _cifar(root: str | None, download: bool, classes: int) -> Images:
    """CIFAR-10 or CIFAR-100 through torchvision, which verifies the files' checksums before it unpickles them."""
    from torchvision import datasets

    name, kind = f"cifar{classes}", {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    path = _require_root(root, name)
    if download:
        _download(kind.__name__, root, name)
    try:
        train, test = kind(str(path), train=True), kind(str(path), train=False)
    except RuntimeError:
        raise UserError(
            f"data set {name} is not in {path / kind.base_folder} (files absent or not torchvision's originals); "
            "put it there, set data.root, or let it be downloaded with data.download=true"
        ) from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    targets = [torch.tensor(part.targets) for part in (train, test)]
    return Images(name, images[0], targets[0], images[1], targets[1], classes)


def _download(kind: str, root: str | None, name: str) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, kind)(str(root), download=True)
    except Exception as error:  # torchvision raises RuntimeError or URLError, by data set
        raise UserError(f"data set {name} could not be downloaded to {root}: {error}") from None


LOADERS = {
    "digits": _digits,
    "mnist": partial(_mnist_like, folder="MNIST", name="mnist"),
    "fashion_mnist": partial(_mnist_like, folder="FashionMNIST", name="fashion_mnist"),
    "kmnist": partial(_mnist_like, folder="KMNIST", name="kmnist"),
    "cifar10": partial(_cifar, classes=10),
    "cifar100": partial(_cifar, classes=100),
}
