"""Strategies that are no method at all: they are what the contract suite composes the others with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.core import Batch, Output, Setting, Source
from cl.hooks import Strategy
from cl.state import Cost, TrainState, tensor_bytes


class Companion(Strategy):
    """A strategy to compose others with: it adds rows, a penalty, an edit of the gradient, and keeps state.

    Made to upset whoever assumes to be alone: its rows precede or follow theirs in the batch, and its penalty depends
    on the weights at the end of the last experience. It draws at the start of every experience, so that a run that
    enters one twice is found out.
    """

    settings = frozenset(Setting)

    def __init__(self, name: str = "companion") -> None:
        self.name = name
        self.stored: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}
        self.strength = 0.0

    def on_experience_start(self, state: TrainState) -> None:
        self.strength = 0.002 * torch.rand((), generator=state.seeds.named(self.name)).item()

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if not self.stored:
            return batch
        pick = torch.randperm(len(self.stored["targets"]), generator=state.seeds.named(self.name))[:4]
        kept = {name: column[pick] for name, column in self.stored.items()}
        rows = Batch(kept["raw"], kept["targets"], kept["experience_id"], kept["sample_ids"], kept.get("task_id"))
        return batch.extended(state.prepare(rows), Source.ANCHOR, self.name, weight=0.25)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if not self.centre:
            return None
        terms = [(p - self.centre[name]).square().sum() for name, p in state.parameters().items()]
        return self.strength * torch.stack(terms).sum()

    def on_gradients(self, state: TrainState) -> None:
        for p in state.parameters().values():
            if p.grad is not None:
                p.grad.mul_(0.99)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        columns = ("raw", "targets", "experience_id", "sample_ids", "task_id")
        kept = {name: getattr(batch, name) for name in columns}
        self.stored = {name: column[:8].clone() for name, column in kept.items() if column is not None}

    def on_experience_end(self, state: TrainState) -> None:
        self.centre = {name: p.detach().clone() for name, p in state.parameters().items()}

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        rows = 4 if self.stored else 0
        return Cost(rows, rows, tensor_bytes(self.stored, self.centre))

    def state_dict(self) -> dict[str, Any]:
        return {"stored": self.stored, "centre": self.centre, "strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stored, self.centre = dict(state["stored"]), dict(state["centre"])
        self.strength = state["strength"]


class Curious(Strategy):
    """Asks for the loss of every batch before it is trained on, and throws the answer away."""

    settings = frozenset(Setting)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        output, terms = state.loss(batch)
        assert output.logits.shape[0] == len(batch)
        assert all(term.dim() == 0 for term in terms.values())
        return batch
