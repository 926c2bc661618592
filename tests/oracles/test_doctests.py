"""The examples in the docstrings of strategies."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import strategies


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(strategies.__path__)])
def test_examples(name):
    assert doctest.testmod(import_module(f"strategies.{name}")).failed == 0
