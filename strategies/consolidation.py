"""Replay-driven consolidation: two buffers of past rows, and a controller that replays as much as was forgotten.

    loss = CE(current) + weight * CE(replayed)
    replayed: round(share B) rows, ceil(long_frac of them) from a reservoir over the whole past, the others from a ring
        of the newest rows

After every measurement weight, share and long_frac follow the forgetting of the domains that were left; the law is in
`strategies/_consolidation_control.py`. Until a domain has been left there is nothing to replay for; from then on until
it is measured, what holds at the target is used. With `trainer.eval_every` the controller acts inside experiences, and
otherwise at their ends. It learns from R, and so from the sets that the stream measures: test sets, of which plain
replay sees nothing, unless `stream.eval_on=validation` measures on rows held out from training.

Source: the replay and the controller of TRC2 (Khadangi, arXiv 2602.22479, v2 to v5), which publishes what is controlled
and from what, but no law; the law is our own, and so are the sizes. Differences: a strategy and not a part of that
network, so that every backbone can have the same; whole rows take the place of chunks around surprising tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from cl.buffers.fifo import Fifo
from cl.buffers.reservoir import Reservoir
from cl.core import Batch, Output, Setting, Source, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_count, require_number
from strategies._consolidation_control import LEAST_WEIGHT, MOST_WEIGHT, Control, Forgetting
from strategies._pooled import Spread


class Consolidation(Strategy):
    """Replay from a ring and a reservoir, as much as forgetting asks for.

    Args:
        ring_capacity: newest rows kept.
        long_capacity: rows kept of the whole past.
        target: forgetting, in units of R (nats, or share of right answers), at which the weight stands still.
        gain: paper's eta: how fast the weight follows.
        most: rows replayed per row of the stream when everything was forgotten; half as many at the target. 0 replays
            nothing.
        weight: factor of the replayed loss at first.
        long_frac: of the replayed rows, from the reservoir at first.
        is_fixed: keep weight, share and long_frac as they are at first: replay without control.

    Cost: round(share B) more rows forward and backward per step.
    """

    settings = frozenset(Setting)
    contract = Contract(
        toy={"ring_capacity": 40, "long_capacity": 100, "most": 1.0}, zero={"most": 0.0}, forgets_less_by=0.1
    )

    def __init__(
        self,
        ring_capacity: int = 1024,
        long_capacity: int = 4096,
        target: float = 0.05,
        gain: float = 2.0,
        most: float = 0.5,
        weight: float = 1.0,
        long_frac: float = 0.5,
        is_fixed: bool = False,
    ) -> None:
        require_count(f"{self.name}.ring_capacity", ring_capacity)
        require_count(f"{self.name}.long_capacity", long_capacity)
        require_number(f"{self.name}.target", target, above=0.0)
        require_number(f"{self.name}.gain", gain)
        require_number(f"{self.name}.most", most)
        require_number(f"{self.name}.weight", weight, above=0.0)
        require_number(f"{self.name}.long_frac", long_frac)
        allowed = f"from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, unless is_fixed is true"
        require(is_fixed or LEAST_WEIGHT <= weight <= MOST_WEIGHT, f"{self.name}.weight", weight, allowed)
        require(long_frac <= 1, f"{self.name}.long_frac", long_frac, "a number from 0 to 1")
        if not isinstance(is_fixed, bool):
            raise UserError(f"{self.name}.is_fixed is {is_fixed!r}; it must be true or false")
        self.target, self.gain, self.most, self.is_fixed = target, gain, most, is_fixed
        self.control = Control(weight, most / 2, long_frac)
        self.forgetting = Forgetting()
        self.ring, self.reservoir = Fifo(ring_capacity), Reservoir(long_capacity)
        self.has_left = False
        self.spread = Spread()

    # which domains were left

    def on_experience_start(self, state: TrainState) -> None:
        self.has_left = bool(self._left(state))

    @staticmethod
    def _left(state: TrainState) -> list[int]:
        """Columns that earlier experiences taught and the running one does not, the one left last at the end."""
        stream = state.stream
        taught = stream.practised_domains or [[j] for j in stream.trained_domains]
        now, every = state.experience.id, list(range(len(stream.eval_sets)))
        # an experience whose domain nobody measures may teach all of them
        columns = [every if -1 in own else own for own in taught]
        order: dict[int, None] = {}
        for own in columns[:now]:
            for j in own:
                order.pop(j, None)
                order[j] = None
        return [j for j in order if j not in taught[now]]

    # replay

    def generator(self, state: TrainState) -> torch.Generator:
        return state.seeds.named(self.name)

    def num_replayed(self, batch_size: int) -> tuple[int, int]:
        """Rows from the reservoir and from the ring beside so many rows of the stream."""
        wanted = round(batch_size * self.control.share) if self.has_left else 0
        # 0.8 less three times 0.1 comes out a little above the half that it is
        num_long = math.ceil(wanted * self.control.long_frac - 1e-9)
        return min(num_long, len(self.reservoir)), min(wanted - num_long, len(self.ring))

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if not any(self.num_replayed(state.step_rows)):
            return batch
        (rows,) = self.spread.shown(state, batch, lambda: self._drawn(state))
        return batch.extended(rows, Source.REPLAY, self.name, self.control.weight * self.spread.factor)

    def _drawn(self, state: TrainState) -> tuple[Batch]:
        """Rows of a step."""
        sizes, generator = self.num_replayed(state.step_rows), self.generator(state)
        drawn = [
            buffer.rows(buffer.draw(size, generator))
            for buffer, size in zip((self.reservoir, self.ring), sizes, strict=True)
            if size
        ]
        return (state.prepare(Batch.cat(drawn), generator),)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        # the step that showed them, which has just been counted: whatever is drawn is from before
        steps = torch.full((len(batch),), state.step - 1, dtype=torch.int64, device=batch.inputs.device)
        for buffer in (self.reservoir, self.ring):
            buffer.add(batch, self.generator(state), step=steps)

    # control

    @property
    def needs_evaluation(self) -> bool:
        return not self.is_fixed

    def on_evaluation(self, state: TrainState, row: Sequence[float | None], max_rows: int | None) -> None:
        sign = 1 if state.info.measure == "loss" else -1
        losses = [None if value is None else sign * value for value in row]
        found = list(self.forgetting.of(losses, self._left(state), max_rows).values())
        if found:
            phi = fmean(found)
            if not self.is_fixed:
                old = fmean(found[:-1]) if len(found) > 1 else found[-1]
                self.control.update(phi, old, found[-1], self.target, self.gain, self.most)
            state.trace(f"{self.name}_forgetting", phi)
        state.trace(f"{self.name}_weight", self.control.weight)
        state.trace(f"{self.name}_share", self.control.share if self.has_left else 0.0)
        state.trace(f"{self.name}_long_frac", self.control.long_frac)

    # what it costs and keeps

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = sum(self.num_replayed(batch_size))
        return Cost(extra, extra, tensor_bytes(self.ring.columns, self.reservoir.columns))

    def state_dict(self) -> dict[str, Any]:
        return {
            "ring": self.ring.state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "lowest": self.forgetting.state_dict(),
            "control": [self.control.weight, self.control.share, self.control.long_frac],
            "has_left": self.has_left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ring.load_state_dict(state["ring"])
        self.reservoir.load_state_dict(state["reservoir"])
        self.forgetting.load_state_dict(state["lowest"])
        self.control = Control(*state["control"])
        self.has_left = state["has_left"]
