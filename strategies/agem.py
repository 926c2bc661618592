"""Averaged gradient episodic memory: a step may not increase the loss on a batch of stored rows.

    g' = g                        if g . r >= 0
    g' = g - (g . r / r . r) r    otherwise; g of the current loss, r of the stored rows' mean cross-entropy

Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019. The memory policy differs between codes
and matters, so it is an argument: Avalanche (training/plugins/agem.py) keeps some rows of each experience; mammoth
(models/agem.py) one batch of each, except in its first commit, which kept capacity // experiences rows: that is the
code of its published table.
Differences: rows are drawn uniformly from the whole memory, where Avalanche draws as many of each experience. The
projection covers every parameter, also heads that the current batch does not use; both codes leave those out, and then
g' . r is not zero. Rows of the running experience enter the memory at its end, as in both codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl.hooks import Contract
from cl.state import Cost, TrainState
from strategies._checks import require_count
from strategies._episodic import EpisodicMemory, flattened, loss_gradient, write_gradient


class Agem(EpisodicMemory):
    """Project the gradient onto the half-space in which the memory's loss does not increase.

    Args:
        capacity: rows stored.
        replay_batch_size: rows drawn for the reference gradient.
        memory: "per_experience" keeps capacity // number of experiences rows of each, "one_batch" one batch of each.

    Cost: replay_batch_size more rows forward and backward per step, from the second experience on.
    """

    parallel = frozenset({"ddp"})
    contract = Contract(
        toy={"capacity": 100, "replay_batch_size": 64},
        why_not_zero="a projection has no strength",
        forgets_less_by=0.2,
    )

    def __init__(self, capacity: int = 200, replay_batch_size: int = 128, memory: str = "per_experience") -> None:
        require_count("agem.replay_batch_size", replay_batch_size)
        super().__init__(capacity, replay_batch_size, memory)

    def on_gradients(self, state: TrainState) -> None:
        if len(self.buffer) == 0:
            return
        rows, _ = self.drawn(state, batch_size=0)
        reference = loss_gradient(state, rows)
        parameters = list(state.parameters().values())
        gradient = flattened(parameters, [p.grad for p in parameters])
        if torch.dot(gradient, reference) < 0:
            write_gradient(parameters, project(gradient, reference))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = self.num_drawn(batch_size)
        return Cost(extra, extra, self.buffer_bytes)


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """The vector nearest to `gradient` that is orthogonal to `reference`.

    Example:
        >>> project(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])).tolist()
        [1.0, 0.0]
    """
    return gradient - (torch.dot(gradient, reference) / torch.dot(reference, reference)) * reference
