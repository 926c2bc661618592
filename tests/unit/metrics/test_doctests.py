"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import cl.metrics

MODULES = [module.name for module in pkgutil.iter_modules(cl.metrics.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"cl.metrics.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
