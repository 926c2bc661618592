"""Weight factorization and centralization: learn each experience in low-rank factors, then merge them into the network.

    waking:    W_t = W + B_t A_t, and only B_t and A_t are trained           from the second experience on
    sleeping:  W <- W_1 + alpha * mean over t of B_t A_t                      (start = "base", and W = W_1 when awake)
               W <- W + alpha * B_t A_t                                       (start = "merged")

W_1 is the network after the first experience, in which all of it is trained.

Source: Ugan, Pham & Waibel, "Weight Factorization and Centralization for Continual Learning in Speech Recognition",
Interspeech 2025. No code was found. The paper begins with a pretrained model; a network that begins at random has to be
trained first, so here the first experience makes the base. Which weights are factorised, the rank and alpha are choices
of ours: all linear and convolutional ones, the head's too. Biases and normalisation stay as the first experience left
them, but running statistics move. Heads of single tasks are trained as they are, those of finished tasks too where
another strategy shows rows of theirs: what lies below them changes with every merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl.core import StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require_at_rest, require_choice, require_count, require_number
from strategies._factors import FactorNet, Factors
from strategies._quadratic import Vectors, copied
from strategies.update_periods import require_no_carry

STARTS = ("base", "merged")


class WeightFactorization(Strategy):
    """Train factors of each experience on a frozen network, and merge them when it ends.

    Args:
        rank: of the factors.
        alpha: share of the merged factors that the network takes.
        start: every experience starts from the "base", and the network is the base plus the mean of all factors; or
            from what is "merged", to which its own factors are added.

    Raises:
        UserError: a value outside its range, a network without linear and convolutional layers, or a strategy beside it
            that moves weights outside of the loop's steps, carries gradients on or generates the weights.

    Cost: no rows; the factors of every experience, and with start="base" a copy of the network, are kept.
    """

    contract = Contract(
        toy={"rank": 4, "alpha": 0.5, "start": "merged"},
        why_not_zero="only factors learn after the first experience, whatever the arguments are",
        why_not_better="the base of the toy runs is one experience of a random network, too little to adapt for others",
    )

    def __init__(self, rank: int = 8, alpha: float = 1.0, start: str = "base") -> None:
        require_count("weight_factorization.rank", rank)
        require_number("weight_factorization.alpha", alpha)
        require_choice("weight_factorization.start", start, STARTS)
        self.rank, self.alpha, self.start = rank, alpha, start
        self.base: Vectors = {}
        """Weights that every experience starts from."""
        self.merged: list[Factors] = []
        self.is_awake = False
        """Whether factors are learnt now."""

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        require_at_rest(self, strategies)
        require_no_carry(self, strategies, "freezes")

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        return FactorNet(backbone, self.rank, self.name)

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        net = _net(model)
        if not set(net.names) <= {name for name, _ in net.backbone.named_parameters()}:
            raise UserError(
                f"{self.name} factorises weights, and a strategy behind it generates them instead; leave one of the "
                "two out"
            )

    def on_resume(self, state: TrainState) -> None:
        _net(state.model).is_frozen = self.is_awake

    def on_experience_start(self, state: TrainState) -> None:
        if state.experience.id == 0:
            return
        net = _net(state.model)
        weights = _weights(net)
        if self.start == "base" and not self.base:
            self.base = {name: weight.detach().clone() for name, weight in weights.items()}
        _write(weights, self.base)
        net.redraw(state.seeds.fresh(self.name, "factors", state.experience.id))
        for factor in (*net.up, *net.down):
            state.optimizer.state.pop(factor, None)
        net.is_frozen = self.is_awake = True

    def on_gradients(self, state: TrainState) -> None:
        """Penalties on parameters, of other strategies, see the frozen network too."""
        if not self.is_awake:
            return
        net = _net(state.model)
        for name in net.shared:
            # none at all: zero would still be moved by momentum and weight decay
            net.backbone.get_parameter(name).grad = None

    def on_experience_end(self, state: TrainState) -> None:
        if not self.is_awake:
            return
        net = _net(state.model)
        net.is_frozen = self.is_awake = False
        weights, own = _weights(net), net.factors()
        if self.start == "base":
            self.merged.append(own)
            _write(weights, centralised(self.base, self.merged, self.alpha))
        else:
            _write(weights, centralised(weights, [own], self.alpha))
        state.note("factors_norm", float(torch.stack([(up @ down).norm() for up, down in own.values()]).norm()))

    @property
    def seals(self) -> str:
        return "merged the factors"

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "merged": [{name: list(pair) for name, pair in factors.items()} for factors in self.merged],
            "is_awake": int(self.is_awake),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base = copied(state["base"])
        self.merged = [
            {name: (up.clone(), down.clone()) for name, (up, down) in factors.items()} for factors in state["merged"]
        ]
        self.is_awake = bool(state["is_awake"])


def centralised(base: dict[str, Any], merged: list[Factors], alpha: float) -> Vectors:
    """Weights plus alpha times the mean of the products of factors.

    Example:
        >>> one, two = [{"w": (torch.ones(1, 1) * k, torch.ones(1, 1))} for k in (1, 3)]
        >>> centralised({"w": torch.zeros(1, 1)}, [one, two], 0.5)["w"].item()
        1.0
    """
    found = {}
    for name, weight in base.items():
        mean: Tensor = torch.stack([factors[name][0] @ factors[name][1] for factors in merged]).mean(0)
        found[name] = weight.detach() + alpha * mean.view_as(weight)
    return found


def _weights(net: FactorNet) -> dict[str, nn.Parameter]:
    parameters = dict(net.backbone.named_parameters())
    return {name: parameters[name] for name in net.names}


def _write(weights: dict[str, nn.Parameter], values: Vectors) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def _net(model: nn.Module) -> FactorNet:
    for module in model.modules():
        if isinstance(module, FactorNet):
            return module
    raise UserError("weight_factorization finds no factors in the model; another strategy has taken them out")
