"""What A-GEM and GEM have in common: a memory filled at the end of every experience, and gradients as flat vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.buffers.base import draw_without_replacement, stored_rows
from cl.core import Batch, Output, Stream
from cl.state import TrainState
from strategies._checks import require, require_choice
from strategies._rehearsal import Rehearsal


class EpisodicMemory(Rehearsal):
    """Keeps some rows of every finished experience, drawn at random from all of its rows.

    Args:
        capacity: rows stored.
        memory: "per_experience" keeps capacity // number of experiences rows of each, as Avalanche with its
            `patterns_per_experience` set to that; "one_batch" keeps one batch of each, as mammoth's A-GEM, and samples
            by reservoir once they are more than `capacity`.
    """

    def __init__(self, capacity: int, replay_batch_size: int | None, memory: str) -> None:
        super().__init__(capacity, replay_batch_size)
        require_choice(f"{self.name}.memory", memory, ("per_experience", "one_batch"))
        self.memory = memory
        self.rows_per_step = 0

    def check(self, stream: Stream) -> None:
        super().check(stream)
        num = stream.info.num_experiences
        capacity = self.buffer.capacity
        allowed = f"at least {num}, one row for each experience of the stream"
        require(self.memory == "one_batch" or capacity >= num, f"{self.name}.capacity", capacity, allowed)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        self.rows_per_step = max(self.rows_per_step, len(batch))

    def on_experience_end(self, state: TrainState) -> None:
        share = self.buffer.capacity // state.info.num_experiences
        size = self.rows_per_step if self.memory == "one_batch" else share
        generator = self.generator(state)
        for rows in stored_rows(state.data, draw_without_replacement(len(state.data), size, generator)):
            self.buffer.add(rows, generator)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rows_per_step": self.rows_per_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rows_per_step = state["rows_per_step"]


def loss_gradient(state: TrainState, rows: Batch) -> Tensor:
    """Gradient of the mean cross-entropy of prepared rows, flat, zero where a parameter has no part in it.

    The same in all processes, or they would project, and move their weights, each in its own way.
    """
    parameters = list(state.parameters().values())
    output = state.forward(rows)
    loss = state.label_loss(output, rows)
    return state.world.firsts(flattened(parameters, state.gradients(loss, parameters)))


def flattened(parameters: list[nn.Parameter], gradients: Any) -> Tensor:
    """Gradients of the given parameters as one vector; None counts as zero."""
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def write_gradient(parameters: list[nn.Parameter], gradient: Tensor) -> None:
    """Spread a flat gradient over `p.grad`.

    A parameter that had no gradient and now gets nothing but zeros is left without one, so that momentum and weight
    decay go on leaving unused heads alone.
    """
    for p, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        if p.grad is not None:
            p.grad.copy_(piece.view_as(p))
        elif piece.any():
            p.grad = piece.view_as(p).clone()
