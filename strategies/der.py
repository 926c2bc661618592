"""Dark experience replay: stored rows must keep the logits that the network gave them when it first saw them.

    loss = CE(current) + alpha * mean over drawn rows and outputs of (logits - stored logits)^2

The mean is over replay_batch_size * C entries, so alpha depends on the number of outputs C.

Source: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020; order
of operations as in mammoth (aimagelab/mammoth models/der.py): draw, step, then insert the un-augmented current rows by
reservoir sampling, with the logits of the forward pass before the update.
Differences: one forward pass over all rows instead of two, which is the same sum unless the backbone normalises over
the batch. Avalanche's DER is another method: it computes the logits at the end of the experience.
In several processes every buffer holds the logits of all rows, which the processes send each other after each step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.core import Batch, Output, Source
from cl.hooks import Contract
from cl.state import Cost, TrainState
from strategies._checks import require_number, require_stored
from strategies._rehearsal import Rehearsal


class Der(Rehearsal):
    """Distil from stored logits.

    Args:
        capacity: rows stored, each with its logits.
        replay_batch_size: rows drawn per step; None takes as many as the step has of the stream.
        alpha: factor of the squared error; 0 draws nothing.

    Cost: replay_batch_size more rows forward and backward per step.
    """

    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(toy={"capacity": 100, "alpha": 1.0}, zero={"alpha": 0.0}, forgets_less_by=0.12)

    def __init__(self, capacity: int = 200, replay_batch_size: int | None = None, alpha: float = 0.5) -> None:
        super().__init__(capacity, replay_batch_size)
        require_stored(self.name, replay_batch_size, capacity)
        require_number(f"{self.name}.alpha", alpha)
        self.alpha = alpha
        self._stored_logits: Tensor | None = None
        # by micro-batch of the running step, of which this process sees a share: its rows' logits, and how many all are
        self._shares: dict[int, tuple[Tensor, int]] = {}

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self._stored_logits = None
        if self.alpha == 0 or len(self.buffer) == 0:
            return batch
        rows, slots = self.shown(state, batch)
        self._stored_logits = self.buffer.take("logits", slots).to(state.device)
        # weight 0: these rows have no label loss, `penalty` reads their logits from the joint forward pass
        return batch.extended(rows, Source.REPLAY, self.name, weight=0.0)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if state.world.size > 1:
            own = batch.parts[0]
            self._shares[state.micro_step] = (output.logits.detach()[own.rows], len(own) + own.elsewhere)
        if self._stored_logits is None or len(self._stored_logits) == 0:
            return None
        part = next(part for part in batch.parts_of(self.name) if part.weight == 0)
        stored = self._stored_logits[state.world.shown(len(self._stored_logits))]
        factor = self.alpha * self.spread.factor * part.share
        return factor * F.mse_loss(output.logits[part.rows].float(), stored)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        logits = output.logits
        if state.world.size > 1:
            logits = torch.cat([state.world.joined(*share) for _, share in sorted(self._shares.items())])
            self._shares = {}
        self.buffer.add(batch, self.generator(state), logits=logits.float())

    def num_draws(self) -> int:
        """Draws per step, each of `num_drawn` rows."""
        return int(self.alpha > 0)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = self.num_draws() * self.num_drawn(batch_size)
        return Cost(extra, extra, self.buffer_bytes)
