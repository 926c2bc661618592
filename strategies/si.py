"""Synaptic intelligence: hold parameters by how much their movement lowered the loss while they were trained.

    omega_i <- omega_i - g_i * (change of theta_i)                     every step
    Omega_i <- Omega_i + omega_i / ((theta_i - theta_last,i)^2 + xi)   at the end of an experience
    penalty = strength * sum_i Omega_i (theta_i - theta_last,i)^2

Source: Zenke, Poole & Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017. Three conventions:
"van_de_ven" (GMvandeVen/continual-learning models/cl/continual_learner.py) is as written above, with xi = 0.1;
"zenke" keeps Omega from becoming negative; "avalanche" (training/plugins/synaptic_intelligence.py) cuts Omega at 0.001,
halves the penalty and takes xi = 1e-7.
Differences: g is the whole gradient that the optimizer is given, penalties included, as in van de Ven and Avalanche;
the paper takes the gradient of the label loss. Movement is measured around the optimizer step, so that any optimizer,
schedule and clipping is accounted for. Avalanche leaves out normalisation layers; we do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl.core import Batch, Setting
from cl.hooks import Contract
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require_choice, require_number
from strategies._quadratic import Quadratic, Vectors, copied, snapshot

XI = {"van_de_ven": 0.1, "zenke": 0.1, "avalanche": 1e-7}
LARGEST_AVALANCHE_IMPORTANCE = 0.001


class Si(Quadratic):
    """Hold parameters by their contribution to learning.

    Args:
        strength: paper's c; 0 measures nothing.
        xi: damping, bounds the importance of parameters that hardly moved; None takes the convention's.
        convention: "van_de_ven", "zenke" or "avalanche".

    Cost: no rows; two passes over the parameters per step.
    """

    parallel = frozenset({"ddp"})
    settings = frozenset(Setting)
    contract = Contract(toy={"strength": 1.0}, zero={"strength": 0.0}, forgets_less_by=0.04)

    def __init__(self, strength: float = 0.3, xi: float | None = None, convention: str = "van_de_ven") -> None:
        super().__init__(strength)
        require_choice("si.convention", convention, tuple(XI))
        if xi is not None:
            require_number("si.xi", xi, above=0.0)
        self.xi, self.convention = xi or XI[convention], convention
        self.path: Vectors = {}

    @property
    def factor(self) -> float:
        return self.strength / 2 if self.convention == "avalanche" else self.strength

    def weights(self, name: str) -> Tensor:
        importance = super().weights(name)
        return importance.clamp(max=LARGEST_AVALANCHE_IMPORTANCE) if self.convention == "avalanche" else importance

    def on_run_start(self, state: TrainState) -> None:
        if self.strength > 0:
            self.anchor = snapshot(state)
            self.path = {name: torch.zeros_like(p) for name, p in self.anchor.items()}

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        if self.strength == 0:
            update()
            return
        before = snapshot(state)
        update()
        for name, p in state.parameters().items():
            if p.grad is not None:
                self.path[name].addcmul_(p.grad, before[name].sub_(p.detach()))

    def on_experience_end(self, state: TrainState) -> None:
        if self.strength == 0:
            return
        solution = snapshot(state)
        for name, path in self.path.items():
            gained = path / ((solution[name] - self.anchor[name]).square() + self.xi)
            total = self.importance[name] + gained if name in self.importance else gained
            self.importance[name] = total.clamp(min=0.0) if self.convention == "zenke" else total
            path.zero_()
        self.anchor = solution

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return super().cost(state, batch_size) + Cost(buffer_bytes=tensor_bytes(self.path))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"path": self.path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.path = copied(state["path"])
