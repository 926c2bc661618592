"""Plain training on each experience in turn: the lower reference of every comparison."""

from __future__ import annotations

from cl.hooks import Contract, Strategy


class Naive(Strategy):
    """Do nothing against forgetting."""

    contract = Contract(zero={}, why_not_better="it is what the others are compared with")
