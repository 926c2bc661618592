"""`result.json`: what every run leaves behind, and the only thing reports and comparisons read.

The schema is documented in README.md; `SCHEMA` grows when a key changes its meaning.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

SCHEMA = 1


@dataclass
class Result:
    """One run.

    Args:
        R: R[i][j] = measure on domain j after training on experience i; None where not evaluated.
        R_init: measure on each domain before training.
        domains: column names of R; equal to `experiences` unless experiences share domains.
        trained: column that each experience teaches, -1 where no single one does.
        practises: columns whose rows each experience trains on; empty when that is `trained` throughout.
        num_tokens, num_bytes: size of each domain's held-out text; empty unless R holds losses of text.
        within: evaluations inside experiences, as [experience, step, domain, value].
        course: where a run on text stood now and then, at every measurement and at the end of every experience, as
            [experience, step, tokens trained on, learning rate]; -1 is before training.
        extra: what else was measured beside R, as [name, experience, domain, value]; -1 is before training.
        traces: curves over optimizer steps that strategies and backbones wrote down, as [name, step, value].
        metrics: every scalar of `cl.metrics`; None where undefined.
        status: "done", "interrupted" or "failed".
        error: sentence that says why a run failed.
    """

    stream: str
    strategy: list[str]
    backbone: str
    setting: str
    seed: int
    experiences: list[str]
    domains: list[str]
    trained: list[int]
    measure: str
    R: list[list[float | None]] = field(default_factory=list)
    R_init: list[float | None] = field(default_factory=list)
    within: list[list[float]] = field(default_factory=list)
    practises: list[list[int]] = field(default_factory=list)
    course: list[list[float]] = field(default_factory=list)
    extra: list[list[Any]] = field(default_factory=list)
    traces: list[list[Any]] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    status: str = "interrupted"
    error: str = ""
    mlflow_run_id: str | None = None
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(_finite(asdict(self)), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result.

        Raises:
            ValueError: the file is no result of this schema; the sentence names the file and what is wrong.
        """
        try:
            content = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a result file: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} has schema {found!r}; this version reads schema {SCHEMA}")
        unknown = set(content) - set(cls.__dataclass_fields__)
        try:
            return cls(**{key: value for key, value in content.items() if key not in unknown})
        except TypeError as error:
            raise ValueError(f"{path} is not a complete result: {error}") from None

    @property
    def label(self) -> str:
        """Name of the composition in tables: its strategies joined by "+"."""
        return "+".join(self.strategy)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` in one step: a reader or a crash never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a plain name, and not one of `tempfile`, whose files are for their owner's eyes only
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # a full disk does not say what it had no room for
            error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as file:
        file.write(text.encode())


def environment() -> dict[str, Any]:
    """Versions and machine facts that a number depends on; imports nothing."""
    return {"python": platform.python_version(), "system": sys.platform, "versions": dict(_versions())}


@cache
def _versions() -> dict[str, str]:
    """Looked for once a process: they are read from files."""
    versions = {}
    for name in ("cl-lab", "torch", "torchvision", "avalanche-lib", "mlflow", "hydra-core", "triton", "numba", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has neither, and browsers refuse them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
