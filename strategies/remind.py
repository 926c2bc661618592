"""REMIND: early layers are frozen after the first experience, and what they say of old rows is stored in few bytes.

    first experience:  plain training of everything; then G, the first `cut` stages, is frozen, a product quantiser is
                       fitted to its outputs, and the codes of all rows are stored
    every later step:  loss = mean CE of n current rows and r stored ones,  F(decode(code(G(x)))) for both

F, the rest, is trained on nothing but decoded outputs, and sees decoded ones at evaluation. After the step the codes of
the current rows are stored; a full buffer gives up a random row of its largest class for each. With
`trainer.batch_size=1` this is the streaming protocol of the paper.

Source: Hayes et al., "REMIND Your Neural Network to Prevent Catastrophic Forgetting", ECCV 2020 (tyler-hayes/REMIND
image_classification_experiments/REMINDModel.py).
Differences: k-means of scikit-learn in place of faiss, so that a seed gives the same codebooks everywhere; pieces of a
vector differ by one number in width where the codebooks do not divide it. Random crops of decoded maps are taken of
stored rows only, at continuous positions. The optimizer is the run's (there: SGD, momentum 0.9, weight decay 1e-5). G
is never changed again, by any optimizer or other strategy, nor what it remembers by `commit`: stored codes are of G as
it was. The paper has one head, and so have the settings here.

Shape legend: B rows, K codebooks, P positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones import Backbone
from cl.buffers._grouped import Grouped, Members
from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Output, Setting, StreamInfo, UserError
from cl.hooks import Contract
from cl.seeding import derive_seed
from cl.state import Cost, TrainState, tensor_bytes
from strategies._backbone import in_float, require_backbone, require_own_weights
from strategies._checks import require, require_count, require_number, require_stored
from strategies._map_augment import beta, resized_crops
from strategies._modes import evaluation_mode
from strategies._product_quantiser import LARGEST_CODEBOOK, MapQuantiser, ProductQuantiser, as_vectors
from strategies._rehearsal import Rehearsal

NEEDS = "stages that it can be split between"
SMALLEST_RATE = 0.01
"""Of a class, as a share of the rate it started with."""
ROWS_AT_A_TIME = 500


class Remind(Rehearsal):
    """Replay quantised outputs of frozen early layers.

    Args:
        capacity: rows stored, as one byte for each codebook and position.
        replay_batch_size: paper's r; rows replayed per step.
        cut: stages that are frozen; None freezes all but the last (or the only one).
        num_codebooks: bytes at each position; at most the width is used.
        codebook_size: centres of a codebook.
        per_position: quantise the channels at each position of a map, as published; False takes a map as one vector.
        fit_rows: rows of the first experience that the quantiser is fitted to; None takes all of them.
        crop: show random crops of stored maps, between 2/7 and all of their area.
        mixup: parameter of the beta distribution that pairs of stored rows are mixed by; 0 mixes nothing.
        class_decay, class_decay_every: the learning rate of a class is multiplied by the former after so many rows of
            it (published: 0.5 and 100); 1 keeps it.

    Cost: from the second experience on, replay_batch_size more rows forward (twice as many drawn, but mixed before,
    with mixup) and backward through F, and the current rows once more forward through G, to be stored. At the end of
    the first experience its rows, and fit_rows, forward through G.
    """

    settings = frozenset({Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL})
    contract = Contract(
        toy={"capacity": 400, "replay_batch_size": 32},
        why_not_zero="early layers are frozen and quantised after the first experience, whatever the arguments are",
        forgets_less_by=0.2,
    )

    def __init__(
        self,
        capacity: int = 10000,
        replay_batch_size: int = 50,
        cut: int | None = None,
        num_codebooks: int = 32,
        codebook_size: int = 256,
        per_position: bool = True,
        fit_rows: int | None = 2000,
        crop: bool = True,
        mixup: float = 0.0,
        class_decay: float = 1.0,
        class_decay_every: int = 100,
    ) -> None:
        super().__init__(capacity, replay_batch_size)
        require_count("remind.replay_batch_size", replay_batch_size)
        require_stored("remind", replay_batch_size, capacity)
        require_count("remind.cut", cut, none_means="all stages but the last")
        require_count("remind.num_codebooks", num_codebooks)
        require_count("remind.codebook_size", codebook_size)
        require(codebook_size <= LARGEST_CODEBOOK, "remind.codebook_size", codebook_size, "at most 256, to fit a byte")
        require_count("remind.fit_rows", fit_rows, none_means="all rows")
        require_number("remind.mixup", mixup)
        require_number("remind.class_decay", class_decay, above=0.0)
        require(class_decay <= 1, "remind.class_decay", class_decay, "at most 1")
        require_count("remind.class_decay_every", class_decay_every)
        self.buffer = LargestClass(capacity)
        self.cut, self.num_codebooks, self.codebook_size = cut, num_codebooks, codebook_size
        self.per_position, self.fit_rows, self.crop, self.mixup = per_position, fit_rows, crop, mixup
        self.class_decay, self.class_decay_every = class_decay, class_decay_every
        self.maps: MapQuantiser | None = None
        self.num_streamed: dict[int, int] = {}
        self._replayed: tuple[Batch, Tensor] | None = None
        self._kept_frac = 1.0
        """Of the first of two rows that are mixed."""
        self._labels: list[int] = []
        """Of the running step's rows, from all its micro-batches so far."""

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        # not at first use: its import draws from Python's global generator
        import sklearn.cluster  # noqa: F401

        backbone = require_backbone(model, "remind", NEEDS)
        require_own_weights(backbone, "remind")
        num_stages = len(backbone.stages())
        if self.cut is not None and self.cut > num_stages:
            raise UserError(f"remind.cut is {self.cut}; {type(model).__name__} has {num_stages} stages")

    def on_resume(self, state: TrainState) -> None:
        self._install(state)

    # G: frozen and quantised

    def _backbone(self, state: TrainState) -> Backbone:
        return require_backbone(state.model, "remind", NEEDS)

    def _cut(self, state: TrainState) -> int:
        return self.cut or max(1, len(self._backbone(state).stages()) - 1)

    def _early_modules(self, state: TrainState) -> list[nn.Module]:
        stages = self._backbone(state).stages()[: self._cut(state)]
        return [module for stage in stages for module in stage.modules]

    def _install(self, state: TrainState) -> None:
        if self.maps is not None:
            self._backbone(state).between[self._cut(state)] = self.maps

    def _early(self, state: TrainState, rows: Batch) -> Tensor:
        """What G says of prepared rows, in evaluation mode; decoded once there is a quantiser."""
        state.count(forwards=len(rows))
        with torch.no_grad(), evaluation_mode(state.model), state.autocast():
            return in_float(self._backbone(state).stage_outputs(rows.inputs, stop=self._cut(state))[-1])

    def _outputs(self, state: TrainState, index: Tensor) -> list[tuple[Batch, Tensor]]:
        """Rows of the running experience and what G says of them."""
        pieces = []
        for some in index.split(ROWS_AT_A_TIME):
            rows = state.prepare(state.data.rows(some))
            pieces.append((rows, self._early(state, rows)))
        return pieces

    def _freeze(self, state: TrainState) -> None:
        """End of the first experience: fit the quantiser, store all rows."""
        num_rows, generator = len(state.data), self.generator(state)
        index = draw_without_replacement(num_rows, self.fit_rows or num_rows, generator)
        outputs = torch.cat([early for _, early in self._outputs(state, index)])
        seed = derive_seed(state.seeds.root, self.name, "k-means") % 2**31
        vectors = as_vectors(outputs, self.per_position)
        quantiser = ProductQuantiser.fitted(vectors, self.num_codebooks, self.codebook_size, seed)
        maps = MapQuantiser(quantiser, self.per_position and outputs.dim() > 2, outputs.shape[1:])
        for some in torch.randperm(num_rows, generator=generator).split(ROWS_AT_A_TIME):
            for rows, early in self._outputs(state, some):
                self._store(state, rows, maps.encode(early))
        self.maps = maps
        self._install(state)

    def _store(self, state: TrainState, rows: Batch, codes_BPK: Tensor) -> None:
        self.buffer.add(replace(rows, raw=codes_BPK), self.generator(state))

    # F: one step

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self._replayed, maps = None, self.maps
        if maps is None:
            return batch
        if state.micro_step == 0:
            self._labels = []
        self._labels += batch.current().targets.tolist()
        for module in self._early_modules(state):
            module.eval()
        rows, other = self.spread.shown(state, batch, lambda: self._mixed(state, maps))
        if len(rows):
            self._replayed = rows, other
        first, *others = batch.parts
        mean = first.weight * (1 - self._part(state))
        return replace(batch, parts=(replace(first, weight=mean), *others))

    def _mixed(self, state: TrainState, maps: MapQuantiser) -> tuple[Batch, Tensor]:
        """Stored rows of a step, two by two with mixup, and the labels that were mixed in."""
        generator, num = self.generator(state), self.num_drawn(state.step_rows)
        rows, self._kept_frac = self._stored(maps, self.buffer.draw(num, generator), state, generator), 1.0
        if self.mixup == 0:
            return rows, rows.targets
        second = self._stored(maps, self.buffer.draw(num, generator), state, generator)
        share = self._kept_frac = beta(self.mixup, generator)
        rows.inputs = share * rows.inputs + (1 - share) * second.inputs
        return rows, second.targets

    def _part(self, state: TrainState) -> float:
        """Share of the stored rows among all of a step."""
        num = self.num_drawn(state.step_rows)
        return num / (num + state.step_rows)

    def _stored(self, maps: MapQuantiser, slots: Tensor, state: TrainState, generator: torch.Generator) -> Batch:
        """Stored rows, decoded to what F reads."""
        rows = self.buffer.rows(slots).to(state.device)
        rows.inputs = maps.decode(rows.inputs)
        if self.crop and rows.inputs.dim() == 4 and min(rows.inputs.shape[2:]) > 1:
            rows.inputs = resized_crops(rows.inputs, generator)
        return rows

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if self._replayed is None:
            return None
        (rows, other), share = self._replayed, self._kept_frac
        late = state.forward(rows, partial(self._backbone(state), start=self._cut(state)))
        loss = state.label_loss(late, rows)
        if share < 1:
            loss = share * loss + (1 - share) * state.label_loss(late, replace(rows, targets=other))
        return loss * self._part(state) * self.spread.factor

    def on_gradients(self, state: TrainState) -> None:
        if self.maps is None:
            return
        for module in self._early_modules(state):
            for p in module.parameters():
                # none at all: zero would still be moved by momentum and weight decay
                p.grad = None

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        share = self._rate(self._labels)
        if share == 1:
            update()
            return
        rates = [group["lr"] for group in state.optimizer.param_groups]
        for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        update()
        for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _rate(self, labels: Sequence[int]) -> float:
        """Mean over the step's rows of the share of the learning rate that their class still has."""
        if self.maps is None or self.class_decay == 1:
            return 1.0
        counts = [self.num_streamed.get(label, 0) // self.class_decay_every for label in labels]
        return sum(max(SMALLEST_RATE, self.class_decay**count) for count in counts) / len(counts)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.maps is None:
            return
        # decoded outputs are centres, whose codes are their own
        self._store(state, batch, self.maps.encode(self._early(state, batch)))
        for label in batch.targets.tolist():
            self.num_streamed[label] = self.num_streamed.get(label, 0) + 1

    def on_experience_end(self, state: TrainState) -> None:
        if self.maps is None:
            self._freeze(state)
        for module in self._early_modules(state):
            # passes that others make from here on must not move its running statistics
            module.eval()

    def on_evaluation(self, state: TrainState, row: Sequence[float | None], max_rows: int | None) -> None:
        """Once everybody is done with an experience, modes are as found."""
        if self.maps is not None and state.progress == 1:
            for module in self._early_modules(state):
                module.train()

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        kept = self.buffer_bytes
        if self.maps is None:
            return Cost(buffer_bytes=kept)
        num = self.num_drawn(batch_size)
        return Cost(num + batch_size, num, kept + tensor_bytes(self.maps.quantiser.codebooks))

    def state_dict(self) -> dict[str, Any]:
        maps = {}
        if self.maps is not None:
            shape, books = list(self.maps.shape), list(self.maps.quantiser.codebooks)
            maps = {"codebooks": books, "shape": shape, "per_position": self.maps.per_position}
        return {"buffer": super().state_dict(), "maps": maps, "num_streamed": dict(self.num_streamed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["buffer"])
        maps = state["maps"]
        self.maps = None
        if maps:
            self.maps = MapQuantiser(ProductQuantiser(maps["codebooks"]), maps["per_position"], maps["shape"])
        self.num_streamed = dict(state["num_streamed"])


class LargestClass(Grouped):
    """A new row is stored always; when there is no room, a random row of the largest class goes, be it the new one."""

    def slot(self, group: int, members: Members, uniform: float) -> int | None:
        if self.filled < self.capacity:
            return self._new_slot(members, uniform)
        sizes = {each: len(slots) + (each == group) for each, slots in self.members.items()}
        largest = max(sizes, key=sizes.__getitem__)
        place, slots = int(uniform * sizes[largest]), self.members[largest]
        if place == len(slots):
            return None
        members.append(slots.pop(place))
        return members[-1]
