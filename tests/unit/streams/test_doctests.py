"""The examples in the docstrings run."""

import doctest
from importlib import import_module

import pytest

OWN = ("_augment", "_images", "_options", "_remap", "_rows", "_settings", "permuted", "rotated", "split")


@pytest.mark.parametrize("name", OWN)
def test_examples(name):
    assert doctest.testmod(import_module(f"streams.{name}")).failed == 0
