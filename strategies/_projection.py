"""What OWM, GPM and Hebbian projection have in common: updates leave out what old inputs would feel.

    theta <- theta_before + project(theta_after - theta_before)        around the optimizer step

Whatever made the step, gradient, momentum, Adam's division or weight decay, the weights are held along the directions
that earlier experiences read, so that a response to an old input inside them stays what it was. Convolutions and
spiking layers are projected in the step. Linear layers are held on the side of their inputs (`_held_inputs`), which is
the same projection at a fraction of the work; their weights are made the ones that they answer with every `FOLD_EVERY`
steps, and when the experience ends. With SGD without weight decay it is enough to project their gradients; should
something else move the weights along the directions held, such as a penalty, that is noticed when they are folded.
Until then weight decay in Adam, or with directions held softly, and penalties read the weights as they have moved, so
the network learns a little otherwise than with every step projected; what is held is the same.

Shape legend: N rows of inputs, D inputs of a unit, O units of a layer, R directions held.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Output, StreamInfo, UserError
from cl.hooks import Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require_choice
from strategies._held_inputs import HeldInputs, adds_gradients, project_momentum
from strategies._layer_inputs import Layers, Listener, find_layers, input_rows, listening, require_inputs
from strategies._modes import evaluation_mode
from strategies._quadratic import Vectors, copied
from strategies._subspace import InputSubspace
from strategies._unprotected import Unprotected

OTHERS = ("refuse", "freeze", "train")
ROWS_AT_A_TIME = 256
FOLD_EVERY = 64
Subspace = TypeVar("Subspace", bound=InputSubspace)


class Projection(Strategy, Generic[Subspace]):
    """Hold the weights of every linear and convolutional layer in the subspace of its old inputs.

    To be named before strategies that copy the weights when an experience ends.

    Args:
        others: what becomes of trained layers of other types: "refuse" them, "freeze" them after the first experience
            (running statistics of batch norm too), or "train" them without protection.
    """

    listens = False
    """Whether inputs are looked at in every step, and not only when an experience ends."""

    def __init__(self, others: str = "refuse") -> None:
        require_choice(f"{self.name}.others", others, OTHERS)
        self.others = others
        self.subspaces: dict[str, Subspace] = {}
        self.is_holding = False
        """Whether responses are those of the running experience."""
        self.responses: Vectors = {}
        """By layer, what it said to the directions held before the first step of the experience."""
        self.unprotected = Unprotected()
        self.full: list[str] = []
        """Layers that were reported to have no direction left."""
        self.held: dict[str, HeldInputs] = {}
        self.drifting: list[str] = []
        """Linear layers that more than gradients moves along the directions held in this experience."""
        self.listener = Listener()
        self._seen: dict[int, dict[str, list[Tensor]]] = {}
        self._restored: dict[str, Any] = {}

    # what a method adds

    def new_subspace(self, number: int) -> Subspace:
        """An empty subspace for the layer of this number."""
        raise NotImplementedError

    def begin(self, state: TrainState, layers: Layers) -> None:
        """An experience begins."""

    def rows_at_end(self, state: TrainState) -> Iterator[Tensor]:
        """Numbers of rows whose inputs are looked at when an experience ends, batch by batch.

        A method that listens has learnt by then; its rows only tell how much of them is captured.
        """
        return iter(())

    # the run

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        for other in strategies:
            if isinstance(other, Projection) and other is not self:
                raise UserError(
                    f"{self.name} and {other.name} both hold the weights of every layer, and what one puts back moves "
                    "them along the directions of the other; leave one of the two out"
                )

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        find_layers(model, self.name, self.others)

    def layers(self, state: TrainState) -> Layers:
        return find_layers(state.model, self.name, self.others)

    def on_run_start(self, state: TrainState) -> None:
        self.subspaces = {name: self.new_subspace(number) for number, name in enumerate(self.layers(state))}

    def on_resume(self, state: TrainState) -> None:
        self.on_run_start(state)
        for name, saved in self._restored.items():
            self.subspaces[name].load_state_dict(saved)
            self.subspaces[name].to(state.device)
        self.responses = {name: each.to(state.device) for name, each in self.responses.items()}
        self.unprotected.to(state.device)
        self._restored = {}
        if self.is_holding:
            self._attach(state)

    def on_experience_start(self, state: TrainState) -> None:
        layers = self.layers(state)
        if self.others == "freeze" and state.experience.id > 0:
            self.unprotected.freeze(state, layers)
        self.begin(state, layers)

    def _take_responses(self, state: TrainState) -> None:
        layers, self.is_holding = self.layers(state), True
        self.responses = {
            name: subspace.response(layers[name]) for name, subspace in self.subspaces.items() if subspace.rank
        }
        self.drifting = []
        for name in self.responses:
            project_momentum(state.optimizer, layers[name], self.subspaces[name])

    # one step

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if not self.is_holding:
            # not before: others may move the weights when an experience begins, or one that had ended is gone on with
            self._take_responses(state)
        if self.responses and not self.held:
            self._attach(state)
        self.unprotected.hold_statistics(state)
        if self.listens:
            if not self.listener:
                self.listener.attach(state.model, self.layers(state))
            self.listener.clear()
            if state.micro_step == 0:
                self._seen = {}
        return batch

    def _attach(self, state: TrainState) -> None:
        """Linear layers are held on the side of their inputs from here on."""
        layers, adds = self.layers(state), adds_gradients(state.optimizer)
        for name, response in self.responses.items():
            if type(layers[name]) is nn.Linear:
                by_gradients = adds and name not in self.drifting and self.subspaces[name].is_exact
                self.held[name] = HeldInputs(layers[name], self.subspaces[name], response, by_gradients)

    def _fold(self) -> None:
        """Write into the weights of linear layers what they answer with."""
        for name, held in self.held.items():
            if held.fold() and held.by_gradients:
                held.hold_answers()
                self.drifting.append(name)
            self.responses[name] = held.response

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        """Adds nothing to the loss; tells which of the passes since `on_batch` is the one that is trained on."""
        if self.listener:
            self._seen[state.micro_step] = self.listener.of(batch)
        return None

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        update()
        self.unprotected.put_back(state)
        if not (self.responses or self._seen):
            return
        with torch.no_grad():
            layers = self.layers(state)
            for name, response in self.responses.items():
                if name not in self.held:
                    self.responses[name] = self.subspaces[name].hold(layers[name], response)
            if (state.step + 1) % FOLD_EVERY == 0:
                self._fold()
            self._learn(layers)

    def _learn(self, layers: Layers) -> None:
        passes, self._seen = list(self._seen.values()), {}
        self.listener.clear()
        if not passes:
            return
        require_inputs(layers, {name for each in passes for name in each}, self.name)
        for name, subspace in self.subspaces.items():
            # what was called with no rows, such as a node of a tree that nobody fetched, read nothing
            inputs = [each for seen in passes for each in seen.get(name, ()) if each.numel()]
            if not inputs:
                continue
            at_hand = self.held[name].rows_of(inputs[0]) if len(inputs) == 1 and name in self.held else None
            if at_hand is None:
                subspace.update(torch.cat([input_rows(layers[name], each) for each in inputs]))
            else:
                subspace.update(*at_hand)

    # the end of an experience

    def settle(self, state: TrainState) -> None:
        """Linear layers are left with the weights that they answer with."""
        self._fold()
        for held in self.held.values():
            held.detach()
        self.held = {}

    def on_experience_end(self, state: TrainState) -> None:
        self.listener.detach()
        self.settle(state)
        self.is_holding = False
        layers = self.layers(state)
        self.unprotected.release_statistics(state)
        last: dict[str, Tensor] = {}
        with torch.no_grad(), evaluation_mode(state.model), listening(state.model, layers) as listener:
            for index in self.rows_at_end(state):
                listener.clear()
                state.forward(state.prepare(state.data.rows(index)))
                seen = listener.passes[-1][1]
                require_inputs(layers, seen, self.name)
                for name, inputs in seen.items():
                    rows_ND = torch.cat([input_rows(layers[name], each) for each in inputs])
                    if not len(rows_ND):
                        continue
                    last[name] = rows_ND
                    if not self.listens:
                        self.subspaces[name].update(rows_ND)
        for name, subspace in self.subspaces.items():
            for what, value in subspace.measures().items():
                state.note(f"{name}_{what}", value)
            subspace.end_task()
            state.note(f"{name}_rank", subspace.rank)
            if name in last:
                state.note(f"{name}_captured", subspace.captured(last[name]))
            if subspace.is_full and name not in self.full:
                self._report(state, name, subspace)

    def _report(self, state: TrainState, name: str, subspace: InputSubspace) -> None:
        """A layer has no direction left; it stands still from now on."""
        self.full.append(name)
        warnings.warn(
            f"{self.name}: no direction of the {subspace.rank} inputs of layer {name} is free after experience "
            f"{state.experience.id} ({state.experience.name!r}); the layer stays as it is from now on, and training "
            "goes on with the others",
            stacklevel=2,
        )

    def drawn(self, state: TrainState, num_rows: int | None, at_a_time: int = ROWS_AT_A_TIME) -> Iterator[Tensor]:
        """Numbers of some rows of the running experience; None takes all of them."""
        count = len(state.data)
        index = draw_without_replacement(count, min(num_rows or count, count), state.seeds.named(self.name))
        return iter(index.split(at_a_time))

    # what it costs and keeps

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        kept = {name: subspace.state_dict() for name, subspace in self.subspaces.items()} or self._restored
        return {
            "subspaces": kept,
            "responses": self.responses,
            "is_holding": self.is_holding,
            "frozen": self.unprotected.frozen,
            "full": list(self.full),
            "drifting": list(self.drifting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # which layer a subspace belongs to is known when there is a model
        self.subspaces, self._restored = {}, {name: copied(saved) for name, saved in state["subspaces"].items()}
        self.responses, self.is_holding = copied(state["responses"]), state["is_holding"]
        self.unprotected.load_state_dict(state["frozen"])
        self.full, self.drifting = list(state["full"]), list(state["drifting"])
