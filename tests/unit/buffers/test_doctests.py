"""The examples in the docstrings of buffers."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import cl.buffers


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(cl.buffers.__path__)])
def test_examples(name):
    assert doctest.testmod(import_module(f"cl.buffers.{name}")).failed == 0
