"""What is learnt, and in which order: one file, one family of streams, one or more configs that name it."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`streams.from_avalanche` lives with all that knows Avalanche, and is found here because it makes streams."""
    if name == "from_avalanche":
        return import_module("cl.interop.avalanche").from_avalanche
    raise AttributeError(f"module 'streams' has no attribute {name!r}")
