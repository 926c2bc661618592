"""Plain training on each experience in turn: the lower reference of every comparison.

Source: the "SGD", "none" or "finetuning" row of the field's tables.
"""

from __future__ import annotations

from cl.core import Setting
from cl.hooks import Contract, Strategy


class Naive(Strategy):
    """Do nothing against forgetting."""

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(zero={}, why_not_better="it is what the others are compared with")
