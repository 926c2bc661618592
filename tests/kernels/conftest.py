"""Kernel tests: shared properties are loaded by path; `tests/conftest.py` switches the interpreter on."""

import importlib.util
import sys
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


for _name in ("kernel_properties", "memory_cases", "rnn_cases", "all_cases"):
    _load(_name)


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
            return out.fill_(float("nan")) if out.is_floating_point() or out.is_complex() else out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
