"""Experience replay: train again on a few stored rows beside every batch.

    loss = CE(current) + weight * CE(replayed)                      (average="source")
    loss = mean CE over current and replayed rows together          (average="row")

Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019; order of operations as in mammoth
(aimagelab/mammoth models/er.py): draw, step, then insert the un-augmented current rows.
Differences: one forward pass over all rows instead of two, which is the same sum unless the backbone normalises over
the batch. `policy="experience_balanced", update="experience_end", average="row"` is Avalanche's variant, which does
not replay the running experience.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cl.buffers.base import make_buffer, stored_rows
from cl.core import Batch, Output, Source, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes


class Replay(Strategy):
    """Replay stored rows.

    Args:
        capacity: rows stored.
        replay_batch_size: rows replayed per step; None takes as many as the batch has.
        weight: factor of the replayed rows' loss; 0 replays nothing.
        policy: which rows stay: reservoir, class_balanced, experience_balanced, ring.
        update: "step" inserts after every step, "experience_end" once from the whole experience.
        average: "source" adds the two mean losses, "row" takes one mean over all rows.
    """

    contract = Contract(toy={"capacity": 100}, zero={"weight": 0.0}, forgets_less_by=0.1)

    def __init__(
        self,
        capacity: int = 200,
        replay_batch_size: int | None = None,
        weight: float = 1.0,
        policy: str = "reservoir",
        update: str = "step",
        average: str = "source",
    ) -> None:
        if update not in ("step", "experience_end"):
            raise UserError(f"replay.update is {update!r}; it must be step or experience_end")
        if average not in ("source", "row"):
            raise UserError(f"replay.average is {average!r}; it must be source or row")
        self.buffer = make_buffer(policy, capacity)
        self.replay_batch_size, self.weight = replay_batch_size, weight
        self.update, self.average = update, average

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        size = self._num_replayed(len(batch))
        if size == 0:
            return batch
        generator = state.seeds.named("replay")
        rows = state.prepare(self.buffer.rows(self.buffer.draw(size, generator)), generator)
        mixed = batch.extended(rows, Source.REPLAY, self.name, self.weight)
        if self.average == "row":
            mixed.parts = tuple(replace(part, weight=part.weight * len(part) / len(mixed)) for part in mixed.parts)
        return mixed

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.update == "step":
            self.buffer.add(batch, state.seeds.named("replay"))

    def on_experience_end(self, state: TrainState) -> None:
        if self.update == "experience_end":
            for rows in stored_rows(state.data):
                self.buffer.add(rows, state.seeds.named("replay"))

    def _num_replayed(self, batch_size: int) -> int:
        if self.weight == 0:
            return 0
        return min(len(self.buffer), self.replay_batch_size or batch_size)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = self._num_replayed(batch_size)
        return Cost(extra, extra, tensor_bytes(self.buffer.columns))

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
