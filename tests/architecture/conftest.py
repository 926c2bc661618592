"""The house as data: every source file with its imports."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cl", "strategies", "streams", "kernels", "configs")


@dataclass(frozen=True)
class Import:
    """One imported name, dotted and absolute; `is_lazy` inside a function or for type checkers only."""

    module: str
    line: int
    is_lazy: bool


@dataclass(frozen=True)
class SourceFile:
    """A Python file of the packages; `module` is its import name."""

    path: Path

    @cached_property
    def module(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        lazy = {
            id(inner)
            for later in ast.walk(self.tree)
            if isinstance(later, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(later, ast.If) and ast.unparse(later.test).endswith("TYPE_CHECKING"))
            for inner in ast.walk(later)
        }
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{self._base(node)}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [Import(name, node.lineno, id(node) in lazy) for name in names]
        return tuple(found)

    def _base(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        is_package = self.path.name == "__init__.py"
        parts = self.module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[SourceFile]:
    """Every Python file of the packages, tests and benchmarks left out."""
    return [SourceFile(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
