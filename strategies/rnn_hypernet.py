"""A recurrent hypernetwork: weights are generated layer after layer, so that later ones depend on earlier ones.

    (h_k, s_k) = LSTM([e_t; c_k], (h_{k-1}, s_{k-1})),   chunk_k = V h_k + v,   theta_t = [chunk_1, ..., chunk_K]
    loss       = CE(x; theta_t) + beta / |old| * sum_{j old} sum_i w_ji (theta*_ji - theta_ji(phi + delta))^2
    growth     = G more units at every new task, which change nothing that was generated before

Everything around the generator is as in `hypernet`. w is 1, or the Fisher information of the generated weights
(`importance_rows`).

Source: Chandra et al., "Continual Learning with Dependency Preserving Hypernetworks", WACV 2023. Neither code nor
formulas of the paper were at hand: recurrence over the layers, a regulariser and growth are from its abstract; the
LSTM, the form of the regulariser and the rule of growth are our own choices. So this is a recurrent hypernetwork in the
style of the paper, and no reproduction of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cl.core import Batch
from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require, require_count
from strategies._hypernet import Hypernetwork
from strategies._hypernet_recurrent import RecurrentGenerator
from strategies._hypernet_strategy import Generating
from strategies._quadratic import Vectors


class RnnHypernet(Generating):
    """Generate weights by an LSTM over chunks, and pin what it generates for old tasks.

    Args:
        chunk_size: numbers that one step generates; a larger layer takes several steps.
        units: of the LSTM, for the first task.
        growth: more units for every new task.
        freezes: after a growth old units stay as they are, and old tasks go on without the new ones: they are not
            forgotten at all, and nothing is penalised.
        embedding: width of a task's embedding.
        chunk_embedding: width of a step's embedding, always trained (until it is frozen).
        beta, lookahead, penalty_conditions, targets, importance_rows, heads, start, embedding_lr: see `Generating`.

    Cost: as `hypernet` of as many parameters, in K steps one after the other; no rows.
    """

    contract = Contract(
        toy={"chunk_size": 300, "units": 48, "growth": 8, "beta": 0.1, "start": "xavier"},
        why_not_zero="weights are generated, whatever the strength is",
        forgets_less_by=0.15,
    )

    def __init__(
        self,
        chunk_size: int = 2000,
        units: int = 32,
        growth: int = 0,
        freezes: bool = False,
        embedding: int = 32,
        chunk_embedding: int = 16,
        beta: float = 0.01,
        lookahead: bool = True,
        penalty_conditions: int | None = None,
        targets: str = "weights",
        importance_rows: int | None = None,
        heads: str = "one",
        start: str = "backbone",
        embedding_lr: float | None = None,
    ) -> None:
        super().__init__(
            embedding, beta, lookahead, penalty_conditions, targets, importance_rows, heads, start, embedding_lr
        )
        for name, value in (("chunk_size", chunk_size), ("units", units), ("chunk_embedding", chunk_embedding)):
            require_count(f"{self.name}.{name}", value)
        is_count = isinstance(growth, int) and not isinstance(growth, bool) and growth >= 0
        require(is_count, f"{self.name}.growth", growth, "an integer of at least 0")
        allowed = f"false unless {self.name}.growth is above 0"
        require(not freezes or growth > 0, f"{self.name}.freezes", freezes, allowed)
        self.chunk_size, self.units, self.growth, self.freezes = chunk_size, units, growth, freezes
        self.chunk_embedding = chunk_embedding
        self.frozen = 0
        """Units that stay as they are, with everything they share."""

    def make_generator(self, num_numbers: int) -> nn.Module:
        times = self.num_conditions if self.growth else 1
        sizes = [self.units + self.growth * k for k in range(times)]
        gated = self.num_conditions if self.freezes else 0
        return RecurrentGenerator(num_numbers, self.embedding, self.chunk_embedding, sizes, self.chunk_size, gated)

    def generator(self, state: TrainState) -> RecurrentGenerator:
        found = self.net(state.model).generator
        assert isinstance(found, RecurrentGenerator)
        return found

    def on_experience_start(self, state: TrainState) -> None:
        """Grow for a condition that is new; targets are what was generated before."""
        super().on_experience_start(state)
        net, generator, current = self.net(state.model), self.generator(state), self.condition(state)
        if self.growth and self.old and current not in net.seen_conditions():
            generator.grow()
        if not self.freezes:
            return
        if current >= 0 and current not in net.seen_conditions():
            generator.assign(current)
        self.frozen = int(generator.units_C[self.old].max()) if self.old else 0

    @torch.no_grad()
    def take(self, net: Hypernetwork) -> Vectors:
        """What cannot change needs no targets."""
        return {} if self.freezes else super().take(net)

    def on_gradients(self, state: TrainState) -> None:
        super().on_gradients(state)
        for p, rows in self.held(state):
            if p.grad is not None:
                p.grad[rows] = 0

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        """Momentum, weight decay and the pull of other strategies do not move what is frozen or not in use either."""
        kept = [(p, rows, p.detach()[rows].clone()) for p, rows in self.held(state)]
        update()
        with torch.no_grad():
            for p, rows, value in kept:
                p[rows] = value

    def held(self, state: TrainState) -> list[tuple[Tensor, tuple[slice, ...]]]:
        """Parameters that frozen units take part in, or units not yet in use, with the part that must stay."""
        generator, every, old = self.generator(state), slice(None), slice(self.frozen)
        new = slice(generator.active, None)
        unused: list[tuple[Tensor, tuple[slice, ...]]] = [
            (generator.inputs_4HD, (every, new)),
            (generator.recurrent_4HH, (every, new)),
            (generator.bias_4H, (every, new)),
        ]
        if not self.frozen:
            return unused
        return [
            *unused,
            (generator.chunks_KE, (every,)),
            (generator.inputs_4HD, (every, old)),
            (generator.recurrent_4HH, (every, old, old)),
            (generator.bias_4H, (every, old)),
            (generator.last.weight, (every, old)),
            (generator.last.bias, (every,)),
        ]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.frozen = state["frozen"]
