"""Kernel tests: shared properties are loaded by path; `tests/conftest.py` switches the interpreter on."""

import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def _load(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, _HERE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for _name in ("kernel_properties", "memory_cases", "rnn_cases", "attention_cases", "all_cases"):
    _load(_name)


def _interpret_faster() -> None:
    """Triton's interpreter patches its language at every call of a device function, as long as a matrix product takes.

    A launch does so too and takes it back, for the language that kernels see; that of Triton's own functions stays so.
    Hence once per module is enough.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpret_faster()


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nan_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor is born full of NaN, so an element nobody writes cannot hide."""

    def poisoned(make):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            # of a leaf that has a gradient, as torch's own checkpoints make, too
            if out.is_floating_point() or out.is_complex():
                out.detach().fill_(float("nan"))
            return out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


CROSSED = (
    "test_all_key_distributions",
    "test_any_length_without_a_start_and_bit_equal",
    "test_extremes",
    "test_tiles_of_both_widths",
    "test_other_chunks",
)
"""What the interpreter tries with every op: CI runs every second square of the board, `make test-all` the others."""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Squares are counted along both sides, so that no op and nothing that is tried with it is left out."""
    ranks: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for item in items:
        if item.path.name == "test_interpreter.py" and item.originalname in CROSSED:
            place = 0
            for name, value in item.callspec.params.items():
                seen = ranks[item.originalname, name]
                place += seen.setdefault(str(getattr(value, "name", value)), len(seen))
            if place % 2:
                item.add_marker(pytest.mark.grid)
