"""What works here: versions, devices, kernel backends, data roots, the MLflow store.

Usage: cl doctor [data.root=DIR] [tracking.uri=ADDRESS]

Exit code 1 when something that every run needs is missing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from typing import Any

from rich.console import Console
from rich.table import Table

from cl.core import UserError

Check = tuple[str, str, str]
"""(status, what was looked at, what was found); status is "ok", "absent" (optional) or "broken"."""

NEEDED = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "rich", "hydra-core", "mlflow")
OPTIONAL = ("torchvision", "avalanche-lib", "datasets", "peft", "transformers", "triton", "numba")


def main(words: list[str]) -> int:
    """Print every check; 1 when one is broken."""
    options = {"data.root": os.environ.get("CL_DATA_ROOT", ""), "tracking.uri": ""}
    for word in words:
        name, _, value = word.partition("=")
        if name not in options or not value:
            raise UserError(f"{word!r} is no option of `cl doctor`; its options are {', '.join(options)}")
        options[name] = value
    table = Table(box=None, pad_edge=False)
    for column in ("", "checked", "found"):
        table.add_column(column)
    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    is_broken = False
    for status, checked, found in checks(options["data.root"], options["tracking.uri"]):
        is_broken |= status == "broken"
        table.add_row(f"[{colours[status]}]{status}[/]", checked, found)
    Console().print(table)
    return int(is_broken)


def checks(root: str, uri: str) -> Iterator[Check]:
    """Every check, in order."""
    yield "ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield from _packages()
    yield from _devices()
    yield from _kernels()
    yield from _data(root)
    yield _store(uri)


def _packages() -> Iterator[Check]:
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield "ok", name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield ("broken" if name in NEEDED else "absent"), name, "not installed"


def _devices() -> Iterator[Check]:
    import torch

    yield "ok", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if not torch.cuda.is_available():
        yield "absent", "gpu", "none that torch can use"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield "ok", f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _kernels() -> Iterator[Check]:
    """Which backend of each op `auto` takes here, asked with small inputs."""
    from cl.cli.listing import kernels

    for entry in kernels():
        yield _tried(f"kernel {entry.name}", lambda name=entry.name: f"auto takes {_backend(name)}")


def _backend(name: str) -> str:
    import torch

    from kernels.bench.shapes import PROBLEMS
    from kernels.common import explain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = getattr(import_module(f"kernels.{name}"), name).plan
    problem = next(problem for problem in PROBLEMS.values() if _plan_of(problem.op) is plan)
    return explain(problem.op, **problem.draw((1, 64, 2, 16), torch.float32, device)).backend


def _plan_of(op: Any) -> Any:
    """The function that decides for an op; the benchmark fixes some options of some."""
    plan = op.plan if hasattr(op, "plan") else op.func.plan
    return getattr(plan, "func", plan)


def _data(root: str) -> Iterator[Check]:
    """Every data set that is there, and one line for each reason why others are not."""
    from streams._images import LOADERS, load_images

    absent: dict[str, list[str]] = {}
    for name in LOADERS:
        try:
            images = load_images(name, root or None)
            yield "ok", f"data {name}", f"{len(images.targets)} training rows of {tuple(images.shape)}"
        except UserError as error:
            absent.setdefault(str(error) if root else "data.root is not set", []).append(name)
    for reason, names in absent.items():
        yield "absent", f"data {', '.join(names)}", reason


def _store(uri: str) -> Check:
    from cl.tracking import check_store, default_uri

    def found() -> str:
        check_store(uri or default_uri())
        return f"{uri or default_uri()} answers"

    return _tried("mlflow store", found)


def _tried(checked: str, attempt: Callable[[], str]) -> Check:
    try:
        return "ok", checked, attempt()
    except Exception as error:  # whatever is wrong with it, the table says so
        return "broken", checked, str(error) or type(error).__name__
