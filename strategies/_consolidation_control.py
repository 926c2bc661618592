"""How much to replay, from how much was forgotten: a bounded proportional controller.

phi_j = max(0, loss_j - lowest loss_j so far)        over the domains that were left
phi   = mean_j phi_j,   phi_last of the domain left last,   phi_old = mean over the others
log weight <- clip(log weight + gain (phi - target), log 0.05, log 2)
rows    <- round(B most phi / (phi + target)),   most = 1/2
long    <- clip(long + 0.1 sign(phi_old - phi_last), 0.2, 0.8)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST_WEIGHT, MOST_WEIGHT = 0.05, 2.0
LEAST_LONG, MOST_LONG, LONG_STEP = 0.2, 0.8, 0.1


@dataclass
class Control:
    """What is replayed, and with which weight; starts with what holds at the target.

    Args:
        weight: factor of the replayed rows' loss.
        share: replayed rows for each row of the stream.
        long_frac: of them, from the long-term buffer.
    """

    weight: float
    share: float
    long_frac: float

    def update(self, phi: float, phi_old: float, phi_last: float, target: float, gain: float, most: float) -> None:
        """One step of the law.

        Example:
            >>> control = Control(weight=1.0, share=0.25, long_frac=0.5)
            >>> control.update(phi=0.15, phi_old=0.2, phi_last=0.1, target=0.05, gain=2.0, most=0.5)
            >>> round(control.weight, 4), round(control.share, 4), round(control.long_frac, 4)
            (1.2214, 0.375, 0.6)
        """
        # the exponential comes last: forgetting of hundreds of nats must saturate, not overflow
        log_weight = math.log(self.weight) + gain * (phi - target)
        self.weight = math.exp(min(max(log_weight, math.log(LEAST_WEIGHT)), math.log(MOST_WEIGHT)))
        self.share = most * phi / (phi + target)
        direction = (phi_old > phi_last) - (phi_old < phi_last)
        self.long_frac = min(max(self.long_frac + LONG_STEP * direction, LEAST_LONG), MOST_LONG)


class Forgetting:
    """The lowest loss of every domain so far, at each number of rows that it is measured on."""

    def __init__(self) -> None:
        self.lowest: dict[str, list[float]] = {}

    def of(self, losses: Sequence[float | None], left: Sequence[int], max_rows: int | None) -> dict[int, float]:
        """Forgetting of the domains `left`, in their order; takes the losses in.

        A domain that was never measured before, or not on as many rows, is left out.

        Example:
            >>> seen = Forgetting()
            >>> seen.of([2.0, None], [], None), seen.of([2.5, 1.0], [0], None), seen.of([2.25, 0.5], [0, 1], None)
            ({}, {0: 0.5}, {0: 0.25, 1: 0.0})
        """
        lowest = self.lowest.setdefault(str(max_rows), [math.inf] * len(losses))
        known = {j: loss for j, loss in enumerate(losses) if loss is not None}
        found = {j: max(0.0, known[j] - lowest[j]) for j in left if j in known and lowest[j] < math.inf}
        for j, loss in known.items():
            lowest[j] = min(lowest[j], loss)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self.lowest.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest = {name: list(values) for name, values in state.items()}
