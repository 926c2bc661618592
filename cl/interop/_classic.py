"""Avalanche's classic benchmarks, and those that a function of the user's builds, as streams by name."""

from __future__ import annotations

import gzip
import inspect
import shutil
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cl.core import Stream, UserError
from cl.interop._quiet import quiet, require_avalanche
from cl.interop._streams import from_avalanche
from cl.interop._template import seeded_globals
from cl.interop.catalog import BENCHMARKS

_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Unpacked data sets; removed when the process ends."""


def stream(
    name: str,
    root: str | None = None,
    seed: int = 0,
    setting: str | None = None,
    num_workers: int = 0,
    **options: Any,
) -> Stream:
    """A benchmark of Avalanche by name.

    Args:
        name: a classic benchmark, or the dotted name of a function of yours that returns a benchmark.
        root: folder of the data sets; Avalanche downloads what is not there, or uses its own folder when None.
        seed: of the order of classes, the permutations and so on, where the benchmark takes one.
        setting: see `from_avalanche`.
        options: arguments of the benchmark itself, such as `n_experiences`.

    Raises:
        UserError: no such benchmark or option, or its data are neither here nor can be downloaded.
    """
    require_avalanche()
    make = _maker(name)
    parameters = inspect.signature(make).parameters
    filled = {"seed": seed, "dataset_root": None if root is None else _readable(root)}
    given = {key: value for key, value in filled.items() if key in parameters} | options
    try:
        inspect.signature(make).bind(**given)
    except TypeError as error:
        shown = ", ".join(str(p).split(":")[0] for p in parameters.values())
        raise UserError(f"benchmark {name} cannot be made: {error}; its options are {shown}") from None
    try:
        with quiet(), torch.random.fork_rng(), seeded_globals(seed):
            torch.manual_seed(seed)
            benchmark = make(**given)
            return from_avalanche(benchmark, name=_short(name), setting=setting, num_workers=num_workers)
    except UserError:
        raise
    except Exception as error:  # downloads and archives fail in many ways
        where = f"data.root={root!r}" if root else "Avalanche's own folder, since data.root is not set"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"benchmark {name} could not be made from {where}: {reason}") from error


def _maker(name: str) -> Any:
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"benchmark {name!r} cannot be imported: {error}") from None
    if name not in BENCHMARKS:
        raise UserError(f"Avalanche has no benchmark {name!r}; it has {', '.join(BENCHMARKS)}")
    with quiet():
        return getattr(import_module("avalanche.benchmarks.classic"), name)


def _short(name: str) -> str:
    return f"avalanche_{name.rpartition('.')[2]}"


@cache
def _readable(root: str) -> str:
    """The folder, or a copy whose gzipped MNIST files are unpacked, which is all that torchvision reads."""
    packed = [path for path in Path(root).glob("*/raw/*-ubyte.gz") if not path.with_suffix("").exists()]
    if not packed:
        return root
    copy = tempfile.TemporaryDirectory(prefix="cl-avalanche-")
    _folders.append(copy)
    for folder in {path.parent for path in packed}:
        target = Path(copy.name) / folder.relative_to(root)
        target.mkdir(parents=True)
        for path in folder.iterdir():
            if path.suffix == ".gz":
                with gzip.open(path) as source, (target / path.stem).open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            else:
                (target / path.name).symlink_to(path.resolve())
    return copy.name
