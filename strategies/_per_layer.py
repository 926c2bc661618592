"""Settings that are one value for all layers, or a list with one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def for_layer(values: Any, number: int) -> Any:
    """The value of a layer: the number itself, or that place of a list, whose last value serves all later layers.

    Example:
        >>> [for_layer([0.95, 0.99], number) for number in range(3)], for_layer(0.9, 5)
        ([0.95, 0.99, 0.99], 0.9)
    """
    if isinstance(values, Sequence):
        return values[min(number, len(values) - 1)]
    return values


def listed(values: Any) -> list[Any]:
    """What one value or a list of them holds, for checking."""
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
