"""Small data sets in torchvision's layouts, and the real one where it is at hand."""

import gzip
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def write_idx(array: np.ndarray) -> bytes:
    """An array of bytes in the idx format, written from its description."""
    return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(raw: Path, num_train: int = 120, num_test: int = 60, zipped: bool = False) -> None:
    """Random images and labels 0, 1, ..., 9, 0, 1, ... in the four files of MNIST."""
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in zip(MNIST_FILES, (num_train, num_train, num_test, num_test), strict=True):
        is_image = "idx3" in name
        array = draw.integers(256, size=(count, 28, 28)) if is_image else np.arange(count) % 10
        content = write_idx(array.astype(np.uint8))
        path = raw / f"{name}-ubyte"
        if zipped:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)


def write_cifar(root: Path, classes: int, patch: pytest.MonkeyPatch) -> None:
    """Random images in CIFAR's files; torchvision is told their checksums in the place of the originals'."""
    from torchvision import datasets

    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(classes)

    def written(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def part(count: int) -> dict:
        rows = draw.integers(256, size=(count, 3072)).astype(np.uint8)
        return {"data": rows, "labels" if classes == 10 else "fine_labels": [i % classes for i in range(count)]}

    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(kind, attribute)]
        patch.setattr(kind, attribute, [written(name, part(2 * classes)) for name in names])
    name, checksum = written(kind.meta["filename"], {kind.meta["key"]: [str(c) for c in range(classes)]})
    patch.setattr(kind, "meta", kind.meta | {"filename": name, "md5": checksum})


@pytest.fixture(scope="session")
def idx():
    return write_idx


@pytest.fixture
def mnist_root(tmp_path):
    """A data root of one's own with a small MNIST, to be damaged."""
    write_mnist(tmp_path / "MNIST" / "raw")
    return tmp_path


@pytest.fixture
def zipped_root(tmp_path):
    write_mnist(tmp_path / "zipped" / "MNIST" / "raw", zipped=True)
    return tmp_path / "zipped"


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Every data set that streams know, small."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("MNIST", "FashionMNIST", "KMNIST"):
        write_mnist(root / folder / "raw")
    with pytest.MonkeyPatch.context() as patch:
        for classes in (10, 100):
            write_cifar(root, classes, patch)
        yield str(root)


@pytest.fixture(scope="session")
def real_root():
    """Folder that holds the real MNIST."""
    here = Path(__file__).parents[3]
    for candidate in (os.environ.get("CL_DATA_ROOT"), here.parent / "shared" / "data"):
        if candidate is not None and (Path(candidate) / "MNIST" / "raw").is_dir():
            return str(candidate)
    pytest.skip("no MNIST at CL_DATA_ROOT or ../shared/data")


@pytest.fixture(scope="session")
def real_text():
    """Data root with the development text."""
    here = Path(__file__).parents[3]
    for candidate in (os.environ.get("CL_DATA_ROOT"), here.parent / "shared" / "data"):
        if candidate is not None and (Path(candidate) / "text" / "c4").is_dir():
            return str(candidate)
    pytest.skip("no text at CL_DATA_ROOT or ../shared/data")


@pytest.fixture
def text_root(tmp_path, monkeypatch):
    """A folder with small domains of every format, and a cache of its own."""
    monkeypatch.setenv("CL_CACHE", str(tmp_path / "cache"))
    news = [f"news number {k} about the weather" for k in range(40)]
    code = "".join(f"def f{k}(x):\n    return x + {k}\n\n" for k in range(60))
    folder = tmp_path / "data"
    (folder / "many").mkdir(parents=True)
    lines = [json.dumps({"text": text, "id": k}) + "\n" for k, text in enumerate(news)]
    (folder / "news.jsonl").write_text("".join(lines))
    (folder / "held.jsonl").write_text("".join(lines[:5]))
    (folder / "news.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "code.txt").write_text(code)
    (folder / "qa.jsonl").write_text("".join(json.dumps({"q": f"{k}+1?", "a": f"{k + 1}!"}) + "\n" for k in range(60)))
    (folder / "many" / "b.txt").write_text("second file\n" * 5)
    (folder / "many" / "a.txt").write_text("first file\n" * 5)
    (folder / "many" / "readme.pdf").write_text("not text")
    return folder
