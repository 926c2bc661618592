"""Image data sets held as uint8 tensors: scikit-learn's digits (embedded) and torchvision's layouts under a root."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl.core import UserError


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image data set, and how its pixels become what a backbone reads.

    Args:
        inputs, eval_inputs: (N, channels, height, width) uint8.
        targets, eval_targets: (N,) int64.
        largest: pixel value that becomes 1.0.
        transform, augment: as in `cl.core.Stream`; `open_images` sets them.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    eval_inputs: Tensor
    eval_targets: Tensor
    num_classes: int
    largest: int = 255
    transform: Callable[[Tensor], Tensor] = Tensor.float
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    def part(self, is_train: bool) -> tuple[Tensor, Tensor]:
        """Inputs and targets to train on, or those to measure on."""
        return (self.inputs, self.targets) if is_train else (self.eval_inputs, self.eval_targets)


def load_images(name: str, root: str | None = None, download: bool = False) -> Images:
    """The data set `name`, one of `LOADERS`, as its files hold it.

    Raises:
        UserError: no root given, or files absent or damaged; the sentence names the folder and the files.
    """
    return _loaded(name, None if name == "digits" else root, download)


@lru_cache(maxsize=2)
def _loaded(name: str, root: str | None, download: bool) -> Images:
    """Kept, so that the streams of a process that show the same data set share its rows."""
    return LOADERS[name](root, download)


def _digits(root: str | None, download: bool) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; every fifth image is held out."""
    rows = torch.from_numpy(_digit_rows())
    inputs, targets = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].long()
    held_out = torch.arange(len(targets)) % 5 == 0
    return Images(
        "digits", inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out], num_classes=10, largest=16
    )


def _digit_rows() -> np.ndarray:
    """64 pixels and a label in each row, from scikit-learn's file: to import the library takes a second."""
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        with suppress(OSError, ValueError):
            rows = np.loadtxt(Path(folder, "datasets", "data", "digits.csv.gz"), np.uint8, delimiter=",")
            if rows.shape == (1797, 65):
                return rows
    # another version may keep it elsewhere
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


def _mnist_like(root: str | None, download: bool, folder: str, name: str) -> Images:
    """Four idx files in torchvision's layout, `<root>/<folder>/raw/`, unpacked or gzipped."""
    path = _require_root(root, name, may_create=download) / folder / "raw"
    kinds = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    if download and not all(_idx_file(path, kind) for kind in kinds):
        _download(folder, path.parents[1], name)
    tensors = []
    for kind in kinds:
        file = _idx_file(path, kind)
        if file is None:
            raise UserError(
                f"data set {name} is not in {path}: no file {kind}-ubyte or {kind}-ubyte.gz; put torchvision's "
                f"{folder} there, set data.root, or let it be downloaded with data.download=true"
            )
        tensors.append(read_idx(file, 3 if "idx3" in kind else 1))
    inputs, targets, eval_inputs, eval_targets = tensors
    if inputs.shape[1:] != eval_inputs.shape[1:]:
        raise UserError(
            f"data set {name} in {path} holds images of {' x '.join(map(str, inputs.shape[1:]))} pixels to train on, "
            f"and of {' x '.join(map(str, eval_inputs.shape[1:]))} to measure on; fetch it again"
        )
    for part, labels in ((inputs, targets), (eval_inputs, eval_targets)):
        if len(part) != len(labels) or labels.max() > 9:
            raise UserError(
                f"data set {name} in {path} holds {len(part)} images and {len(labels)} labels from "
                f"{labels.min()} to {labels.max()}; one label from 0 to 9 per image is needed, so fetch it again"
            )
    return Images(name, inputs.unsqueeze(1), targets.long(), eval_inputs.unsqueeze(1), eval_targets.long(), 10)


def _require_root(root: str | None, name: str, may_create: bool = False) -> Path:
    if root is None:
        raise UserError(f"data set {name} needs data.root, the folder of torchvision's data sets, and it is not set")
    path = Path(root).expanduser()
    if not path.is_dir() and not may_create:
        raise UserError(f"data.root is {str(root)!r}, which is not a folder; data set {name} is read from it")
    return path


def _idx_file(folder: Path, kind: str) -> Path | None:
    candidates = (folder / f"{kind}-ubyte", folder / f"{kind}-ubyte.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, num_dims: int) -> Tensor:
    """An idx file of unsigned bytes: two zero bytes, type 8, number of dimensions, each dimension in 4 bytes, data.

    Raises:
        UserError: the file is no such file, is truncated, or holds another number of dimensions or no data.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be unpacked ({error}); fetch it again") from None
    start = 4 + 4 * num_dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, num_dims)):
        raise UserError(f"{path} is not an idx file of unsigned bytes in {num_dims} dimensions; fetch it again")
    shape = tuple(np.frombuffer(content, ">u4", num_dims, offset=4).tolist())
    if len(content) != start + math.prod(shape) or 0 in shape:
        raise UserError(
            f"{path} is damaged: its header announces {' x '.join(map(str, shape))} bytes, {len(content) - start} are "
            "there; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _cifar(root: str | None, download: bool, classes: int) -> Images:
    """CIFAR-10 or CIFAR-100 through torchvision, which verifies the files' checksums before it unpickles them."""
    path = _require_root(root, f"cifar{classes}", may_create=download)

    from torchvision import datasets

    name, kind = f"cifar{classes}", {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    if download:
        _download(kind.__name__, path, name)
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


def _download(kind: str, root: Path, name: str) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, kind)(str(root), download=True)
    except Exception as error:  # torchvision raises RuntimeError, URLError or OSError, by data set
        raise UserError(f"data set {name} could not be downloaded to {root}: {error}") from None


LOADERS: dict[str, Callable[[str | None, bool], Images]] = {
    "digits": _digits,
    "mnist": partial(_mnist_like, folder="MNIST", name="mnist"),
    "fashion_mnist": partial(_mnist_like, folder="FashionMNIST", name="fashion_mnist"),
    "kmnist": partial(_mnist_like, folder="KMNIST", name="kmnist"),
    "cifar10": partial(_cifar, classes=10),
    "cifar100": partial(_cifar, classes=100),
}
