"""Locas: low-rank side memories beside the FFNs, begun from activations and gradients, one for every experience.

    y = FFN(x) + sum_k B_k relu(A_k x)           k: the experiences after the first; A_k (r, d_in), B_k (d_out, r)
    A_k = the r main directions of the FFN's inputs, on rows of the experience        at its start
    B_k = - step * dL/dB at B = 0, on the same rows
    then only A_k and B_k are trained, and the head where experiences bring classes or heads of their own; in the next
    experience they are part of the frozen network.

A finished side memory is rows of a wider FFN (its hidden units stand beside the others), so that merging it changes
nothing that is computed. The first experience trains the network as it is; from then on batch norm uses the running
statistics that it left.

Source: "Locas", low-rank side FFN memories initialised from the model's own activations and gradients, trained on the
context and merged into the FFN [paper abstract]; in the spirit of. Differences: own choices throughout: the context is
an experience; main directions are those of a singular value decomposition, turned so that they fire; a step of gradient
descent begins B. Where a network has no FFN of the Llama layout, every linear layer but the head counts as one; where
it has none of these, the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cl.core import Batch, Setting, StreamInfo, UserError
from cl.hooks import Contract, Strategy, overrides
from cl.state import TrainState, shares
from strategies._checks import require_at_rest, require_count, require_number
from strategies._episodic import EpisodicMemory
from strategies._lora import LoraStrategy
from strategies._modes import evaluation_mode
from strategies.update_periods import require_no_carry

ROWS_AT_A_TIME, TEXTS_AT_A_TIME = 256, 16
"""Rows of an experience in one pass when a side memory begins."""


class Locas(Strategy):
    """Learn every experience after the first in a side memory of its own.

    Args:
        rank: r, hidden units of a side memory.
        step: of the gradient descent that begins B; 0 begins with nothing.
        rows: of an experience that a side memory begins from.

    Raises:
        UserError: a value outside its range, a network without a linear layer, or a strategy beside it that moves
            weights outside of the loop's steps, has weights of its own or makes gradients of all of them.

    Cost: r (d_in + d_out) weights an FFN and experience, all of them held from the start; no rows per step; `rows`
        rows twice forward and once backward at the start of an experience.
    """

    settings = frozenset(Setting)
    contract = Contract(
        toy={"rank": 4, "rows": 32},
        why_not_zero="experiences after the first train side memories, and the rest of the network not at all",
        why_not_better="the toy network has no FFN for text: what is beside its head changes what earlier ones said",
    )

    def __init__(self, rank: int = 8, step: float = 0.1, rows: int = 256) -> None:
        require_count("locas.rank", rank)
        require_number("locas.step", step)
        require_count("locas.rows", rows)
        self.rank, self.step_size, self.rows = rank, step, rows
        self.started = 0

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        require_at_rest(self, strategies)
        require_no_carry(self, strategies, "freezes")
        for other in strategies:
            is_of_all = isinstance(other, EpisodicMemory | LoraStrategy)
            if other is not self and (is_of_all or overrides(other, "wrap")):
                raise UserError(
                    f"{self.name} lets nothing but its side memories learn after the first experience, and "
                    f"{other.name} needs other weights to learn; leave one of the two out"
                )

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        for layer in places(backbone):
            read, written = _widths(layer)
            side = Side(read, written, self.rank, info.num_experiences - 1)
            layer.add_module("side", side.to(next(layer.parameters())))
            layer.register_forward_hook(add_side)
        return backbone

    def on_run_start(self, state: TrainState) -> None:
        self._tell(state)

    def on_resume(self, state: TrainState) -> None:
        self._tell(state)

    def on_experience_start(self, state: TrainState) -> None:
        if state.experience.id == 0:
            return
        self._begin(state, state.experience.id - 1)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if self.started:
            self._set_norms(state, False)
        return batch

    def on_experience_end(self, state: TrainState) -> None:
        self._set_norms(state, state.model.training)

    def _set_norms(self, state: TrainState, is_training: bool) -> None:
        """Running statistics move in training mode only."""
        for module in state.model.modules():
            if isinstance(module, _NormBase):
                module.train(is_training)

    def on_gradients(self, state: TrainState) -> None:
        if not self.started:
            return
        trained = {id(p) for side in sides(state.model).values() for p in side.memory(self.started - 1)}
        if state.info.setting in (Setting.TASK_INCREMENTAL, Setting.CLASS_INCREMENTAL):
            named = state.model.named_parameters()
            trained |= {id(p) for name, p in named if _is_head(name) and ".side." not in name}
        for p in state.model.parameters():
            if id(p) not in trained:
                p.grad = None

    def _begin(self, state: TrainState, number: int) -> None:
        """Fill the side memories of one experience from rows of it."""
        generator = state.seeds.named(self.name)
        index = torch.randperm(len(state.data), generator=generator)[: self.rows]
        at_a_time = TEXTS_AT_A_TIME if state.info.setting == Setting.CONTINUAL_PRETRAINING else ROWS_AT_A_TIME
        pieces = [state.prepare(state.data.rows(some)) for some in index.split(at_a_time)]
        found = list(sides(state.model).values())
        downs = [side.down[number] for side in found]
        steps = [torch.zeros_like(down) for down in downs]
        with evaluation_mode(state.model):
            for side in found:
                side.seen = Seen()
            with torch.no_grad():
                for batch in pieces:
                    state.forward(batch)
            for side in found:
                side.turn(number, generator)
            self.started = number + 1
            self._tell(state)
            for batch, share in zip(pieces, shares(pieces), strict=True):
                loss = share * state.label_loss(state.forward(batch), batch)
                for step, gradient in zip(steps, state.gradients(loss, downs), strict=True):
                    if gradient is not None:
                        step.add_(gradient)
        with torch.no_grad():
            for down, step in zip(downs, steps, strict=True):
                down.sub_(self.step_size * step)

    def _tell(self, state: TrainState) -> None:
        for side in sides(state.model).values():
            side.started = self.started

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = state["started"]


@dataclass
class Seen:
    """Of all that a layer has read: the sum of x^T x (d_in, d_in), that of x, and how many; the rows are not kept."""

    products: Tensor | float = 0.0
    total: Tensor | float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        # squares are summed: double precision holds what single precision read
        x_NI = x.detach().flatten(0, -2).double()
        self.products = x_NI.T @ x_NI + self.products
        self.total = x_NI.sum(0) + self.total
        self.count += len(x_NI)


class Side(nn.Module):
    """Side memories of one layer; those that have not begun are not computed.

    Attributes:
        started: how many have begun.
        seen: inputs of the layer are added here, when it is there.
    """

    def __init__(self, read: int, written: int, rank: int, count: int) -> None:
        super().__init__()
        self.up = nn.ParameterList(torch.zeros(rank, read) for _ in range(count))
        self.down = nn.ParameterList(torch.zeros(written, rank) for _ in range(count))
        self.started = 0
        self.seen: Seen | None = None

    def memory(self, number: int) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.up[number], self.down[number]

    def forward(self, x: Tensor) -> Tensor:
        up, down = (torch.cat(list(each)[: self.started], dim) for each, dim in ((self.up, 0), (self.down, 1)))
        return F.linear(F.linear(x, up).relu(), down)

    @torch.no_grad()
    def turn(self, number: int, generator: torch.Generator) -> None:
        """Turn A to the main directions of what was seen, all readings together; missing ones are drawn. B stays 0."""
        up, seen = self.up[number], self.seen
        if seen is not None and isinstance(seen.products, Tensor):
            found = torch.linalg.eigh(seen.products).eigenvectors.flip(1).T[: min(len(up), seen.count)]
            drawn = F.normalize(torch.randn(len(up) - len(found), up.shape[1], generator=generator), dim=1).to(found)
            a_RI = torch.cat((found, drawn))
            # a direction and its opposite are one: take the one in which it fires
            up.copy_(a_RI * torch.where(a_RI @ seen.total < 0, -1.0, 1.0).unsqueeze(1))
        self.seen = None


def add_side(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Forward hook: what the layer gives, and what its side memories add; other outputs of it stay."""
    side: Side = layer.side  # type: ignore[assignment]
    y = output[0] if isinstance(output, tuple) else output
    if side.started:
        y = y + side(inputs[0])
    if side.seen is not None:
        side.seen.add(inputs[0])
    return (y, *output[1:]) if isinstance(output, tuple) else y


def sides(model: nn.Module) -> dict[str, Side]:
    """By name of the layer."""
    return {name.removesuffix(".side"): m for name, m in model.named_modules() if isinstance(m, Side)}


def places(backbone: nn.Module) -> list[nn.Module]:
    """The FFNs of a network: gated MLPs, else linear layers but the head, else the head.

    Raises:
        UserError: there are none.
    """
    gated = [m for m in backbone.modules() if _ends(m) is not None]
    linear: dict[str, nn.Module] = {name: m for name, m in backbone.named_modules() if type(m) is nn.Linear}
    body = [m for name, m in linear.items() if not _is_head(name)]
    found = gated or body or list(linear.values())
    if not found:
        raise UserError(f"locas needs linear layers, and {type(backbone).__name__} has none")
    return found


def _ends(layer: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """What a gated MLP reads with and writes with, as we or transformers name it; None for other layers."""
    for names in (("gate", "up", "out"), ("gate_proj", "up_proj", "down_proj")):
        parts = [getattr(layer, name, None) for name in names]
        # linear layers, also with adapters around them
        if all(hasattr(part, "in_features") for part in parts):
            return parts[1], parts[2]  # type: ignore[return-value]
    return None


def _widths(layer: nn.Module) -> tuple[int, int]:
    first, last = _ends(layer) or (layer, layer)
    return first.in_features, last.out_features  # type: ignore[return-value]


def _is_head(name: str) -> bool:
    """Ours is called head; those of transformers are somewhere inside `backbone=hf`."""
    parts = name.split(".")
    return parts[0] == "head" or not {"lm_head", "embed_out"}.isdisjoint(parts)
