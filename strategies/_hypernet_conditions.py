"""Conditions, for which a hypernetwork generates weights: the task of an experience, or its domain."""

from __future__ import annotations

from cl.core import Stream
from cl.state import TrainState
from strategies._hypernet import Hypernetwork, heads_of
from strategies._hypernet_layout import Ranges


def conditions(stream: Stream) -> tuple[list[int], int]:
    """Condition of each experience, and how many there are: its task, or the place of its domain.

    Re-occurring experiences share their domain, and so their condition.
    """
    if stream.info.num_heads > 1:
        return [experience.task_id or 0 for experience in stream.experiences], stream.info.num_heads
    domains: dict[str, int] = {}
    table = [domains.setdefault(experience.domain, len(domains)) for experience in stream.experiences]
    return table, len(domains)


def condition_of(state: TrainState, table: list[int]) -> int:
    """Of the running experience; -1 for one that the table does not know."""
    here = state.experience
    if state.info.num_heads > 1 and here.task_id is not None:
        return here.task_id
    return table[here.id] if here.id < len(table) else -1


def other_heads(net: Hypernetwork, condition: int) -> Ranges:
    """Numbers of the heads of other conditions."""
    prefixes = [prefix for first, rest in heads_of(net.backbone).items() for prefix in (first, *rest)]
    others = tuple(prefix for prefix in prefixes if not prefix.endswith(f"heads.{condition}."))
    return [(place.start, place.stop) for place in net.layout.places if others and place.names[0].startswith(others)]
