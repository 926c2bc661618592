"""An epoch of replay after every experience, on a share of each earlier one and on all of the general text.

    after experience t:  one pass over  rate % of the rows of experiences 0 .. t - 1  and the general rows, shuffled

Source: the replay baseline of Wang et al., "TRACE: A Comprehensive Benchmark for Continual Learning in Large Language
Models", 2023; code BeyonderXX/TRACE training/replay.py: 10 % of all earlier tasks and all of Lima, after each task.
Differences: Lima is whatever the stream has as general text, if it has any; rows are chosen once, when their experience
ends; the learning rate stays at its base value through the pass, whatever the schedule has come to. The pass is the
strategy's own: gradients are not clipped (`trainer.clip_norm`), and hooks of other strategies are not called.
"""

from __future__ import annotations

from typing import Any

import torch

from cl.buffers.base import COLUMNS, draw_without_replacement
from cl.core import Batch, Output, Setting
from cl.hooks import Contract, Strategy
from cl.schedules import set_learning_rate
from cl.state import Cost, TrainState, clear_gradients, tensor_bytes
from strategies._checks import require, require_count, require_number
from strategies._quadratic import Vectors, copied


class TraceReplay(Strategy):
    """Replay for an epoch after every experience.

    Args:
        rate: percent of each experience's rows that is kept for later; 0 keeps nothing.
        general: also train on the stream's general text, all of it.
        replay_batch_size: rows of a step of the pass; None takes as many as the stream's steps have.

    Cost: no rows per step; after experience t the kept rows of t earlier experiences and the general rows, once.
    """

    moves_weights = True
    settings = frozenset(Setting)
    contract = Contract(
        toy={"rate": 25.0, "general": False}, zero={"rate": 0.0, "general": False}, forgets_less_by=0.15
    )

    def __init__(self, rate: float = 10.0, general: bool = True, replay_batch_size: int | None = None) -> None:
        require_number("trace_replay.rate", rate)
        require(rate <= 100, "trace_replay.rate", rate, "a percentage of at most 100")
        require(isinstance(general, bool), "trace_replay.general", general, "true or false")
        require_count("trace_replay.replay_batch_size", replay_batch_size, none_means="the rows of the stream's steps")
        self.rate, self.general, self.replay_batch_size = rate, general, replay_batch_size
        self.kept: Vectors = {}
        self.step_rows = 0

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        self.step_rows = max(self.step_rows, len(batch))

    def on_experience_end(self, state: TrainState) -> None:
        general = state.stream.general if self.general else None
        pieces = [self._rows()] if self.kept else []
        if general is not None:
            data = general()
            pieces.append(data.rows(torch.arange(len(data))))
        if pieces:
            self._learn(state, Batch.cat(pieces))
        count = round(len(state.data) * self.rate / 100)
        if count:
            chosen = draw_without_replacement(len(state.data), count, state.seeds.named(self.name))
            self._keep(state.data.rows(chosen.sort().values))

    def _learn(self, state: TrainState, rows: Batch) -> None:
        """One pass over the rows in random order, with the run's own optimizer."""
        generator = state.seeds.named(self.name)
        order = torch.randperm(len(rows), generator=generator)
        set_learning_rate(state.optimizer, 1.0)
        for some in order.split(self.replay_batch_size or self.step_rows):
            batch = state.prepare(rows[some], generator)
            state.backward(state.label_loss(state.forward(batch), batch), state.parameters().values())
            state.optimizer.step()
        clear_gradients(state.optimizer)

    def _keep(self, rows: Batch) -> None:
        rows.raw = rows.inputs
        for name in COLUMNS:
            value = getattr(rows, name)
            if value is not None:
                self.kept[name] = torch.cat([self.kept[name], value]) if name in self.kept else value.clone()

    def _rows(self) -> Batch:
        kept = self.kept
        return Batch(kept["raw"], kept["targets"], kept["experience_id"], kept["sample_ids"], kept.get("task_id"))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.kept))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "step_rows": self.step_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # beside the rows of the stream, which are on the CPU
        self.kept = {name: value.cpu() for name, value in copied(state["kept"]).items()}
        self.step_rows = state["step_rows"]
