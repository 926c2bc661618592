"""SHARP: a sparse network whose units are given to experiences, rewired in phases, and replays hidden activations.

    every phase:   the fewest units of each layer that carry a share tau of its activation are the experience's own, the
                   other free ones are plastic; connections from plastic to other units are dropped, as many are grown
                   at random into plastic units with weight 0; the optimizer starts anew
    every step:    loss = SupCon(h(x)) over current rows and rows replayed as activations in front of the late stages;
                   plastic units of the last layer are silent, weights into frozen units and absent ones do not move
    at the end:    units that took part grow older and are frozen, those before the cut at once, the others when their
                   experience is no longer replayed; activations of some rows of each class are stored in 8 bits;
                   plastic units are drawn anew; representations of the classes are stored, and those of other
                   replayed classes are made again, from the newest activations
    prediction:    the most frequent class of the nearest stored representations, each class seen through its own units

    tau = max(floor, (1 + cos(pi p / 30)) / 2),  p the phase, from 1

Source: Gurbuz, Moorman & Dovrolis, "SHARP: Sparsity and Hidden Activation Replay for Neuro-Inspired Continual
Learning", 2023 (BurakGurbuz97/SHARP-Continual-Learning Source/learner.py, rewire.py, architecture.py, memory.py,
neocortex.py).
Differences: units are selected on rows drawn once per experience (there: its first 1024). The first phase takes p = 1
(there 2). Weights start as the backbone draws them; plastic units are drawn anew at the scale of their whole layer
(there: as if they alone were the layer). A tie of neighbours goes to the nearest. Phases are counted in epochs of the
run: with `trainer.epochs` at phase_epochs * max_phases it is the published schedule. The head of the backbone is not
used. Another strategy's rows keep their own loss.

Shape legend: B rows, F width of the last hidden layer, O units of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones import Backbone
from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Output, Setting, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._activation_store import dequantised, drawn, quantised, votes
from strategies._at_rest import AtRest, clear_gradients, step_beside
from strategies._backbone import in_float, require_backbone
from strategies._checks import require, require_count, require_number
from strategies._contrastive import global_labels, supervised_contrastive
from strategies._modes import evaluation_mode
from strategies._pooled import Spread
from strategies._sparse_units import SparseUnits, as_weights, layers_of

NEEDS = "stages of one layer each"
TAU_PERIOD = 30
SELECTION_ROWS = 1024


class Sharp(Strategy):
    """Give units to experiences, rewire the rest, replay activations, classify by neighbours.

    Args:
        phase_epochs, max_phases: length and number of phases; the last one lasts as long as there are epochs.
        prune: share of connections removed at the start.
        floor: smallest share of activation that the experience's units carry.
        temperature: of the contrastive loss.
        cut: early stages, whose outputs are stored; 0 stores inputs. None takes half of them, rounded up, but leaves
            one.
        num_recent: paper's stm_num_tasks; last experiences that are replayed, and whose late units are not frozen.
        stored_rows: activations kept for each class of these experiences, and representations for each class seen.
        replay_batch_size: rows replayed per step; None takes as many as the step has of the stream.
        num_neighbours: that vote.

    Cost: replay_batch_size more rows forward and backward per step, from the second experience on, through the late
    stages; up to 1024 rows forward in the first step of a phase, stored_rows for each class twice at the end.
    """

    moves_weights = True
    settings = frozenset({Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL})
    contract = Contract(
        toy={"phase_epochs": 1, "prune": 0.2},
        why_not_zero="its network is sparse and its classifier another one, whatever the arguments are",
        why_not_cut="its contrastive loss compares the rows of a micro-batch with each other",
        forgets_less_by=0.1,
    )

    def __init__(
        self,
        phase_epochs: int = 3,
        max_phases: int = 10,
        prune: float = 0.6,
        floor: float = 0.9,
        temperature: float = 0.1,
        cut: int | None = None,
        num_recent: int = 1,
        stored_rows: int = 25,
        replay_batch_size: int | None = None,
        num_neighbours: int = 5,
    ) -> None:
        counts = {"phase_epochs": phase_epochs, "max_phases": max_phases, "num_recent": num_recent}
        for name, count in (counts | {"stored_rows": stored_rows, "num_neighbours": num_neighbours}).items():
            require_count(f"sharp.{name}", count)
        require_count(
            "sharp.replay_batch_size", replay_batch_size, none_means="the rows that the step has of the stream"
        )
        for name, share in (("prune", prune), ("floor", floor)):
            require_number(f"sharp.{name}", share)
            require(share < 1 or (name == "floor" and share == 1), f"sharp.{name}", share, "between 0 and 1")
        require_number("sharp.temperature", temperature, above=0.0)
        is_cut = cut is None or (isinstance(cut, int) and not isinstance(cut, bool) and cut >= 0)
        require(is_cut, "sharp.cut", cut, "an integer of at least 0, or null for half of the stages")
        self.phase_epochs, self.max_phases, self.prune, self.floor = phase_epochs, max_phases, prune, floor
        self.temperature, self.cut, self.num_recent = temperature, cut, num_recent
        self.stored_rows, self.replay_batch_size, self.num_neighbours = stored_rows, replay_batch_size, num_neighbours
        self.units = SparseUnits()
        self.recent: list[dict[int, dict[str, Tensor]]] = []
        """Of the last experiences, the newest last: by class, activations in 8 bits."""
        self.classes: dict[int, dict[str, Tensor]] = {}
        """By class: `vectors` (N, F) and `mask` (F,)."""
        self.phase = [-1, -1]
        """Experience and phase that the network was last rewired for."""
        self.spread = Spread()
        self._replayed: Batch | None = None
        self._holding: AtRest | None = None

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        num_stages = len(layers_of(require_backbone(model, "sharp", NEEDS), "sharp"))
        if self.cut is not None and self.cut >= num_stages:
            raise UserError(
                f"sharp.cut is {self.cut}; {type(model).__name__} has {num_stages} stages, of which one must be late"
            )

    def on_run_start(self, state: TrainState) -> None:
        self.units.pruned(self._layers(state), self.prune, self._draws(state))

    # short cuts

    def _backbone(self, state: TrainState) -> Backbone:
        return require_backbone(state.model, "sharp", NEEDS)

    def _layers(self, state: TrainState) -> list[nn.Linear | nn.Conv2d]:
        return layers_of(self._backbone(state), "sharp")

    def _cut(self, state: TrainState) -> int:
        num_stages = len(self._backbone(state).stages())
        return min((num_stages + 1) // 2, num_stages - 1) if self.cut is None else self.cut

    def _draws(self, state: TrainState) -> torch.Generator:
        return state.seeds.named(self.name)

    def _silenced(self, hidden_BF: Tensor) -> Tensor:
        """Without the plastic units of the last layer, which get no gradient either."""
        return in_float(hidden_BF) * (self.units.ages[-1] != 0)

    # phases

    def _phase(self, state: TrainState) -> list[int]:
        return [state.experience.id, min(state.epoch // self.phase_epochs, self.max_phases - 1) + 1]

    def _rewire(self, state: TrainState) -> None:
        """Steps 2 to 4 of the paper."""
        rows = state.prepare(state.data.rows(self._selection(state)))
        state.count(forwards=len(rows))
        with torch.no_grad(), evaluation_mode(state.model), state.autocast():
            outputs = self._backbone(state).stage_outputs(rows.inputs)
        tau = (1 + math.cos(math.pi * self.phase[1] / TAU_PERIOD)) / 2
        layers = self._layers(state)
        self.units.select([in_float(each) for each in outputs], max(tau, self.floor))
        self.units.grow(layers, self.units.drop(), self._draws(state))
        self.units.apply(layers)
        self._holding = None
        state.optimizer.state.clear()

    def _selection(self, state: TrainState) -> Tensor:
        """The rows that units are selected on, the same ones in all phases of an experience."""
        draws = state.seeds.fresh(self.name, "selection", state.experience.id)
        return draw_without_replacement(len(state.data), SELECTION_ROWS, draws)

    # one step

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if state.micro_step == 0 and self._phase(state) != self.phase:
            self.phase = self._phase(state)
            self._rewire(state)
        self._replayed = None
        if self.recent:
            size = self.replay_batch_size or state.step_rows
            (rows,) = self.spread.shown(state, batch, lambda: (self._drawn(state, size),))
            self._replayed = rows if len(rows) else None
        first, *others = batch.parts
        return replace(batch, parts=(replace(first, weight=0.0), *others))

    def _drawn(self, state: TrainState, size: int) -> Batch:
        """Stored activations, the same number of each class; the first ones get what is left over."""
        kept = {label: codes for experience in self.recent for label, codes in experience.items()}
        pieces, labels = [], []
        for number, (label, codes) in enumerate(kept.items()):
            num = size // len(kept) + (number < size % len(kept))
            some = drawn(len(codes["codes"]), num, self._draws(state)).to(state.device)
            pieces.append(dequantised(codes | {"codes": codes["codes"][some]}))
            labels += [label] * num
        # one of each class after the other, so that every part of a step has rows of all
        turn = torch.cat([torch.arange(len(piece)) for piece in pieces]).argsort(stable=True).to(state.device)
        return self._as_batch(state, torch.cat(pieces)[turn], torch.tensor(labels, device=state.device)[turn])

    def _as_batch(self, state: TrainState, activations: Tensor, labels: Tensor) -> Batch:
        """Activations of known classes as rows that start in the late stages."""
        nowhere = torch.full_like(labels, -1)
        task_id = labels // state.info.num_outputs if state.info.num_heads > 1 else None
        return Batch(activations, labels % state.info.num_outputs, nowhere, nowhere, task_id)

    def _late(self, state: TrainState, rows: Batch) -> Tensor:
        """Hidden layer of stored activations."""
        return state.forward(rows, partial(self._backbone(state), start=self._cut(state))).features

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        hidden, labels = [output.features[: batch.num_current]], [global_labels(batch.current(), state.info)]
        if self._replayed is not None:
            hidden.append(self._late(state, self._replayed))
            labels.append(global_labels(self._replayed, state.info))
        return supervised_contrastive(self._silenced(torch.cat(hidden)), torch.cat(labels), self.temperature)

    def on_gradients(self, state: TrainState) -> None:
        clear_gradients(self._held(state))

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        step_beside(self._held(state), update)

    def _held(self, state: TrainState) -> AtRest:
        """The weights and biases, and where they must stay: into frozen units, and of absent connections.

        Made once a phase: units and connections stay as they are between two rewirings.
        """
        if self._holding is None:
            frozen = self.units.frozen(self._cut(state), self.num_recent)
            layers = list(zip(self._layers(state), self.units.masks, frozen, strict=True))
            weights = [
                (each.weight, as_weights(~mask | rests_O[:, None], each.weight)) for each, mask, rests_O in layers
            ]
            biases = [(each.bias, rests_O) for each, _, rests_O in layers if each.bias is not None]
            self._holding = weights + biases
        return self._holding

    # end of an experience, and prediction

    def on_experience_end(self, state: TrainState) -> None:
        cut, layers, backbone = self._cut(state), self._layers(state), self._backbone(state)
        self.units.promote()
        by_class = self._rows_by_class(state)
        newest = {}
        for label, rows in by_class.items():
            activations = rows.inputs
            if cut > 0:
                state.count(forwards=len(rows))
                with torch.no_grad(), evaluation_mode(state.model), state.autocast():
                    activations = backbone.stage_outputs(rows.inputs, stop=cut)[-1]
            newest[label] = quantised(in_float(activations))
        self.units.reinitialise(layers, self._draws(state))
        with torch.no_grad(), evaluation_mode(state.model):
            for label, rows in by_class.items():
                self._represent(label, state.forward(rows).features, youngest=2)
            done = set(by_class)
            for age, experience in enumerate(reversed(self.recent)):
                for label, codes in experience.items():
                    if label in done:
                        continue
                    done.add(label)
                    rows = self._as_batch(
                        state, dequantised(codes), torch.full((len(codes["codes"]),), label, device=state.device)
                    )
                    self._represent(label, self._late(state, rows), youngest=3 + age)
        self.recent = [*self.recent, newest][-self.num_recent :]

    def _rows_by_class(self, state: TrainState) -> dict[int, Batch]:
        """Some rows of each class of the running experience, ready for the model."""
        labels = torch.cat(
            [
                global_labels(state.data.rows(some), state.info)
                for some in torch.arange(len(state.data)).split(10 * SELECTION_ROWS)
            ]
        )
        found = {}
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero().squeeze(1)
            some = draw_without_replacement(len(rows), self.stored_rows, self._draws(state))
            found[label] = state.prepare(state.data.rows(rows[some]))
        return found

    def _represent(self, label: int, hidden_NF: Tensor, youngest: int) -> None:
        """Store what the last layer says of a class, and through which units it is seen: those old enough."""
        mask = self.units.ages[-1] >= youngest
        self.classes[label] = {
            "vectors": self._silenced(hidden_NF),
            "mask": mask if mask.any() else torch.ones_like(mask),
        }

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        """Before anything is stored, the model itself."""
        if not self.classes:
            return None
        with state.autocast():
            hidden_BF = state.model(batch).features
        num = state.info.num_outputs
        hidden_BF, logits_BC = self._silenced(hidden_BF), torch.zeros(len(batch), num, device=state.device)
        heads = [0] if batch.task_id is None else batch.task_id.unique().tolist()
        for head in heads:
            memory = {label % num: kept for label, kept in self.classes.items() if label // num == head}
            asked = slice(None) if batch.task_id is None else batch.task_id == head
            if memory:
                logits_BC[asked] = votes(hidden_BF[asked], memory, self.num_neighbours, num).to(logits_BC.dtype)
        return Output(logits_BC, hidden_BF)

    # cost and state

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        replayed = (self.replay_batch_size or batch_size) if self.recent else 0
        selected = 0
        if state.has_begun and self._phase(state) != self.phase:
            selected = min(SELECTION_ROWS, len(state.data))
        return Cost(replayed + selected, replayed, tensor_bytes(self.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        return {
            "units": self.units.state_dict(),
            "recent": self.recent,
            "classes": self.classes,
            "phase": list(self.phase),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.units.load_state_dict(state["units"])
        self._holding = None
        self.recent = [dict(experience) for experience in state["recent"]]
        self.classes, self.phase = dict(state["classes"]), list(state["phase"])
