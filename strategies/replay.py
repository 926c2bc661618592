"""Experience replay: train again on a few stored rows beside every batch.

    loss = CE(current) + weight * CE(replayed)                      (average="source")
    loss = mean CE over current and replayed rows together          (average="row")

Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019; order of operations as in mammoth
(aimagelab/mammoth models/er.py): draw, step, then insert the un-augmented current rows.
Mammoth's first commit, which its published numbers come from, takes `average="row"`; the copy in
joey-wang123/CL-refresh-learning adds the two means.
Differences: one forward pass over all rows instead of two, which is the same sum unless the backbone normalises over
the batch. `policy="experience_balanced", update="experience_end", average="row"` is Avalanche's variant, which does
not replay the running experience.
"""

from __future__ import annotations

from cl.buffers.base import stored_rows
from cl.core import Batch, Output, Setting, Source, Stream
from cl.hooks import Contract
from cl.state import Cost, TrainState
from strategies._checks import require, require_choice, require_number, require_stored
from strategies._pooled import lighter, row_share
from strategies._rehearsal import Rehearsal


class Replay(Rehearsal):
    """Replay stored rows.

    Args:
        capacity: rows stored.
        replay_batch_size: rows replayed per step; None takes as many as the step has of the stream.
        weight: factor of the replayed rows' loss; 0 replays nothing.
        policy: which rows stay: reservoir, class_balanced, experience_balanced, ring, fifo.
        update: "step" inserts after every step, "experience_end" once from the whole experience.
        average: "source" adds the two mean losses, "row" takes one mean over all rows.

    Cost: replay_batch_size more rows forward and backward per step.
    """

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(toy={"capacity": 100}, zero={"weight": 0.0}, forgets_less_by=0.25)

    def __init__(
        self,
        capacity: int = 200,
        replay_batch_size: int | None = None,
        weight: float = 1.0,
        policy: str = "reservoir",
        update: str = "step",
        average: str = "source",
    ) -> None:
        super().__init__(capacity, replay_batch_size, policy)
        require_stored(self.name, replay_batch_size, capacity)
        require_number("replay.weight", weight)
        require_choice("replay.update", update, ("step", "experience_end"))
        require_choice("replay.average", average, ("source", "row"))
        self.weight, self.policy, self.update, self.average = weight, policy, update, average

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if stream.info.setting == Setting.CONTINUAL_PRETRAINING:
            allowed = "reservoir or experience_balanced in the continual_pretraining setting, where rows have no class"
            require(self.policy not in ("class_balanced", "ring"), "replay.policy", self.policy, allowed)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if self.weight == 0 or len(self.buffer) == 0:
            return batch
        rows, _ = self.shown(state, batch)
        weight = self.weight * self.spread.factor
        if self.average == "row":
            share = row_share(batch, self.num_drawn(state.step_rows), state.step_rows)
            batch, weight = lighter(batch, share), weight * share
        return batch.extended(rows, Source.REPLAY, self.name, weight)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.update == "step":
            self.buffer.add(batch, self.generator(state))

    def on_experience_end(self, state: TrainState) -> None:
        if self.update == "experience_end":
            for rows in stored_rows(state.data):
                self.buffer.add(rows, self.generator(state))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = 0 if self.weight == 0 else self.num_drawn(batch_size)
        return Cost(extra, extra, self.buffer_bytes)
