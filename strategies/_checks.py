"""Arguments of strategies, checked with one sentence that names the value and the allowed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl.core import UserError
from cl.hooks import Strategy


def require(is_fine: bool, name: str, value: Any, allowed: str) -> None:
    """Raise `UserError` unless the condition holds.

    Args:
        name: the argument as a user writes it, such as "ewc.gamma".
        allowed: what the value must be, to end the sentence.
    """
    if not is_fine:
        raise UserError(f"{name} is {value!r}; it must be {allowed}")


def require_count(name: str, value: Any, none_means: str = "") -> None:
    """An integer of at least 1; also None, when it is told what None means."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    also = f", or null for {none_means}" if none_means else ""
    require(is_count or (value is None and bool(none_means)), name, value, f"an integer of at least 1{also}")


def require_stored(strategy: str, replay_batch_size: Any, capacity: int) -> None:
    """A replay batch that the buffer can hold; None follows the stream's batch, and takes what there is."""
    allowed = f"at most {strategy}.capacity, {capacity}"
    require(
        replay_batch_size is None or replay_batch_size <= capacity,
        f"{strategy}.replay_batch_size",
        replay_batch_size,
        allowed,
    )


def require_number(name: str, value: Any, above: float | None = None) -> None:
    """A finite number of at least 0, or larger than `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if above is None:
        require(is_number and value >= 0, name, value, "a finite number of at least 0")
    else:
        require(is_number and value > above, name, value, f"a finite number above {above:g}")


def require_at_rest(keeper: Strategy, strategies: Sequence[Strategy]) -> None:
    """No other strategy of the run changes, outside of the loop's steps, weights that `keeper` keeps as they are."""
    for other in strategies:
        if other.moves_weights:
            raise UserError(
                f"{keeper.name} keeps weights as they are, and {other.name} would change them in passes of its own; "
                "leave one of the two out"
            )


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    require(value in choices, name, value, f"one of {', '.join(choices)}")


def require_widths(name: str, hidden: Any) -> list[int]:
    """A list of widths of hidden layers, which may be empty."""
    is_list = isinstance(hidden, Sequence) and not isinstance(hidden, str)
    is_fine = is_list and all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in hidden)
    require(is_fine, name, hidden, "a list of integers of at least 1, such as [32,32]")
    return list(hidden)
