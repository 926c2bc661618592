"""The examples in the docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["figures", "style", "words"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"cl.report.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
