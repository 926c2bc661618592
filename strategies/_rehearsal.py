"""What strategies that store rows have in common: a buffer, draws from it, and its place in checkpoints and costs.

Rows are drawn for a whole optimizer step. With `trainer.accumulation` every micro-batch shows its part of them, so that
a step is the same however it is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.buffers.base import make_buffer
from cl.core import Batch
from cl.hooks import Strategy
from cl.state import TrainState, tensor_bytes
from strategies._checks import require_count
from strategies._pooled import Spread


class Rehearsal(Strategy):
    """Owner of a buffer.

    Args:
        capacity: rows stored.
        replay_batch_size: rows drawn for a step; None takes as many as it has of the stream.
        policy: file in `cl/buffers`, which says which rows stay.
    """

    def __init__(self, capacity: int, replay_batch_size: int | None, policy: str = "reservoir") -> None:
        require_count(f"{self.name}.capacity", capacity)
        require_count(f"{self.name}.replay_batch_size", replay_batch_size, none_means="the batch size of the stream")
        self.replay_batch_size = replay_batch_size
        self.buffer = make_buffer(policy, capacity)
        self.spread = Spread()

    def num_drawn(self, batch_size: int) -> int:
        """Rows in one draw beside so many rows of the stream."""
        return min(len(self.buffer), self.replay_batch_size or batch_size)

    def generator(self, state: TrainState) -> torch.Generator:
        return state.seeds.named(self.name)

    def shown(self, state: TrainState, batch: Batch) -> tuple[Batch, Tensor]:
        """Rows of the step's draw that go with a micro-batch, and their slots; `spread.factor` is for their mean."""
        rows, slots = self.spread.shown(state, batch, lambda: self.drawn(state, state.step_rows))
        return rows, slots

    def drawn(self, state: TrainState, batch_size: int) -> tuple[Batch, Tensor]:
        """Stored rows, augmented anew and ready for the model, and the slots that they come from."""
        generator = self.generator(state)
        slots = self.buffer.draw(self.num_drawn(batch_size), generator)
        return state.prepare(self.buffer.rows(slots), generator), slots

    @property
    def buffer_bytes(self) -> int:
        return tensor_bytes(self.buffer.columns)

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
