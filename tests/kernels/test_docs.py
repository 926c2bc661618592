"""Examples in docstrings and in the docs page run and print what they say."""

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(next(iter(kernels.__path__)))
MODULES = sorted(
    ".".join(("kernels", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.name not in ("triton.py", "__main__.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_docs_page():
    page = ROOT.parent / "docs" / "kernels.md"
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def test_every_op_has_its_files_and_its_row():
    ops = [path.name for path in ROOT.iterdir() if (path / "reference.py").exists()]
    index = (ROOT / "README.md").read_text()
    page = (ROOT.parent / "docs" / "kernels.md").read_text()
    for op in ops:
        files = {"__init__.py", "reference.py", "chunked.py", "triton.py"}
        # an op without a kernel says why, and that is what `explain` and the refusal quote
        if hasattr(importlib.import_module(f"kernels.{op}"), "NO_TRITON"):
            files -= {"triton.py"}
        assert files <= {p.name for p in (ROOT / op).iterdir()}, op
        assert f"`{op}(" in index, f"{op} has no row in kernels/README.md"
        assert f"## {op}" in page, f"{op} has no section in docs/kernels.md"


def test_kernels_import_only_torch_triton_and_numba():
    for path in ROOT.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
        allowed = {"torch", "kernels", *sys.stdlib_module_names}
        # aot/__main__ asks for the version under which the table is kept
        if path.name.startswith("triton") or path.parent.name == "aot":
            allowed.add("triton")
        if path.name.startswith("numba"):
            # llvmlite is what numba writes instructions with
            allowed |= {"llvmlite", "numba", "numpy"}
        assert names <= allowed, f"{path}: {names - allowed}"
