"""Dark experience replay ++: stored logits as in `der`, and the labels of a second, independent draw.

    loss = CE(current) + alpha * MSE(logits, stored logits; first draw) + beta * CE(second draw)

Source: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020; order
of operations as in mammoth (aimagelab/mammoth models/derpp.py).
Differences: as `der`.
"""

from __future__ import annotations

from cl.core import Batch, Source
from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require_number
from strategies._pooled import Spread
from strategies.der import Der


class Derpp(Der):
    """Distil from stored logits and replay stored labels.

    Args:
        capacity: rows stored, each with its logits.
        replay_batch_size: rows of each of the two draws per step; None takes as many as the step has of the stream.
        alpha: factor of the squared error; 0 skips its draw.
        beta: factor of the replayed rows' cross-entropy; 0 skips its draw.

    Cost: 2 * replay_batch_size more rows forward and backward per step.
    """

    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(toy={"capacity": 100}, zero={"alpha": 0.0, "beta": 0.0}, forgets_less_by=0.25)

    def __init__(
        self, capacity: int = 200, replay_batch_size: int | None = None, alpha: float = 0.5, beta: float = 1.0
    ) -> None:
        super().__init__(capacity, replay_batch_size, alpha)
        require_number(f"{self.name}.beta", beta)
        self.beta = beta
        self.labelled = Spread()

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        batch = super().on_batch(state, batch)
        if self.beta == 0 or len(self.buffer) == 0:
            return batch
        rows, _ = self.labelled.shown(state, batch, lambda: self.drawn(state, state.step_rows))
        return batch.extended(rows, Source.REPLAY, self.name, weight=self.beta * self.labelled.factor)

    def num_draws(self) -> int:
        return int(self.alpha > 0) + int(self.beta > 0)
