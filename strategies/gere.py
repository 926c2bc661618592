"""General samples replay: a few ordinary texts, trained on beside every task and held to what the first model said.

    loss = CE(current rows and general rows) + w * L(general rows)

L is one of: nothing ("ce"), KL to the original model's probabilities ("kl"), distance of hidden states ("l1", "l2"), or
the threshold-based margin loss ("tm"): a hidden unit that was low, in the middle or high in the original model has to
stay so, with thresholds at mean - sd and mean + sd of the unit over all general tokens. For the latter two bits a unit
are kept (strategies/_ternary.py). The weight w is fixed, or "dynamic": the step's CE over its L, both without gradient.

Source: Zhang et al., "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay",
2025; code Qznan/GeRe (margin loss, weights, insertion of a fixed number of general rows into every effective batch).
Differences: everything is pooled over the effective batch, where the code takes means of micro-batches, half of CE for
each kind of row that a micro-batch happens to hold, and w anew in each; statistics are exact in float64; states are
codes where the code keeps float32; KL, L1 and L2, which the paper compares and the code lacks, are here. `weight` is 1
by default, the smallest that the paper compares for tm; the code's default is 100, and the result in its README is with
"dynamic". A model that was not pretrained says nothing worth keeping before it is trained: `since=1` keeps what it says
after experience 0, and `source=first` then takes the general rows from there.

Shape legend: N general rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl.core import IGNORED, Batch, Data, Output, Setting, Source, Stream, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_choice, require_count, require_number
from strategies._imitation import KINDS, Said, make_imitation
from strategies._modes import evaluation_mode
from strategies._pooled import StepLoss, added, is_last
from strategies._quadratic import Vectors, copied
from strategies._taps import Tap
from strategies._ternary import unpacked

ROWS_AT_A_TIME = 16


class Gere(Strategy):
    """Replay general rows and imitate the original model on them.

    Args:
        loss: ce (labels only), kl, l1, l2 or tm.
        weight: w of the imitation, or "dynamic"; 0 leaves labels only.
        general_weight: factor of the general rows' label loss; None counts every row of a step the same, and 0 leaves
            them to the imitation.
        samples: N; the rows are taken from all over the text.
        general_batch_size: general rows per optimizer step, all micro-batches together.
        source: "general", the stream's general text; or "first", the text of the first experience.
        since: experience before which the original model is looked at; None is 0, or 1 where `source` is first.
            Nothing is done before it.
        layer: path of the module whose output is imitated by l1, l2 and tm; None takes what the head reads.
        margin: thresholds are so many standard deviations from the mean; tm only.
        reduction: "violating" divides by the number of violations, as the code does; "all" by that of all units.
        temperature: of kl.
        top_k: keep so many probabilities of a token, and the sum of the others; None keeps all; kl only.
        exclude_first: leave the first token of every document out of the imitation, where states are outliers.

    Raises:
        UserError: the stream has no general text, or a value outside its range.

    Cost: general_batch_size more rows forward and backward per step; N rows forward once; with tm twice, and once more
    after every experience, to note the share of units that left their region (`code_flips`).
    """

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})
    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(
        toy={"loss": "kl", "source": "first", "samples": 64, "general_batch_size": 8},
        zero={"weight": 0.0, "general_weight": 0.0},
        forgets_less_by=0.25,
    )

    def __init__(
        self,
        loss: str = "tm",
        weight: float | str = 1.0,
        general_weight: float | None = None,
        samples: int = 1000,
        general_batch_size: int = 8,
        source: str = "general",
        since: int | None = None,
        layer: str | None = None,
        margin: float = 1.0,
        reduction: str = "violating",
        temperature: float = 2.0,
        top_k: int | None = None,
        exclude_first: bool = False,
    ) -> None:
        require_choice("gere.loss", loss, KINDS)
        if weight != "dynamic":
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            is_fine = is_number and 0 <= weight < float("inf")
            require(is_fine, "gere.weight", weight, "a number of at least 0, or dynamic")
        if general_weight is not None:
            require_number("gere.general_weight", general_weight)
        require_count("gere.samples", samples)
        require_count("gere.general_batch_size", general_batch_size)
        require_choice("gere.source", source, ("general", "first"))
        first = int(source == "first")
        is_count = isinstance(since, int) and not isinstance(since, bool) and since >= first
        require(since is None or is_count, "gere.since", since, f"an integer of at least {first} with source {source}")
        require(layer is None or isinstance(layer, str), "gere.layer", layer, "the path of a module, or null")
        require_number("gere.margin", margin, above=0.0)
        require_choice("gere.reduction", reduction, ("violating", "all"))
        require_number("gere.temperature", temperature, above=0.0)
        require_count("gere.top_k", top_k, none_means="all of them")
        require(isinstance(exclude_first, bool), "gere.exclude_first", exclude_first, "true or false")
        self.kind, self.weight, self.general_weight = loss, weight, general_weight
        self.samples, self.general_batch_size = samples, general_batch_size
        self.source, self.since = source, first if since is None else since
        self.exclude_first = exclude_first
        self.imitates = loss != "ce" and weight != 0
        self.is_off = not self.imitates and general_weight == 0
        self.imitation = make_imitation(loss, temperature, top_k, margin, reduction)
        self.tap = None if layer is None else Tap(layer)
        self.general: Batch | None = None
        self.kept: Vectors = {}
        self.fitted: Vectors = {}
        self.drawn = 0
        self.is_begun = False
        self.label_loss = StepLoss()

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if self.is_off:
            return
        if self.source == "general" and stream.general is None:
            raise UserError(
                f"gere replays general text, and stream {stream.info.name} has none: set stream.general to text that "
                "no experience trains on, with an eval_path or an eval_frac, such as {name: web, path: web.jsonl, "
                "eval_frac: 0.1}; or strategy.gere.source=first"
            )
        count = len(stream.experiences)
        require(self.since < count, "gere.since", self.since, f"below the number of experiences, {count}")

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        if self.tap is not None:
            self.tap.check(model, "gere.layer")

    def on_run_start(self, state: TrainState) -> None:
        if self.is_off:
            return
        data: Data = (state.stream.experiences[0].load if self.source == "first" else state.stream.general)()
        count = min(self.samples, len(data))
        self.general = data.rows(torch.arange(count) * len(data) // count)
        self.general.sample_ids = torch.arange(count)

    def on_resume(self, state: TrainState) -> None:
        self.on_run_start(state)

    def on_experience_start(self, state: TrainState) -> None:
        if self.is_off or state.experience.id != self.since:
            return
        self.is_begun = True
        if not self.imitates:
            return
        self.fitted = {name: value.to(state.device) for name, value in self.imitation.fit(self._said(state)).items()}
        kept = [self.imitation.kept(said, self.fitted) for said in self._said(state)]
        self.kept = {name: torch.cat([each[name] for each in kept]) for name in kept[0]}

    def _said(self, state: TrainState) -> Iterator[Said]:
        """What the model says to all general rows, some at a time."""
        if self.tap is not None:
            self.tap.open(state.model)
            self.tap.hears_all = True
        with torch.no_grad(), evaluation_mode(state.model):
            for some in torch.arange(len(self.general)).split(ROWS_AT_A_TIME):
                rows = state.prepare(self.general[some])
                yield self._on(state, rows, state.forward(rows), slice(None))
        if self.tap is not None:
            self.tap.close()

    def _on(self, state: TrainState, rows: Batch, output: Output, where: slice) -> Said:
        """What was said to rows, which were `where` in their batch."""
        states = output.hidden if self.tap is None else self.tap.value
        if states is None and self.kind != "kl":
            raise UserError(
                f"gere.loss={self.kind} needs hidden states, and {type(state.model).__name__} does not say what its "
                "head reads; name a module with strategy.gere.layer, or take the loss kl or ce"
            )
        counted = rows.targets != IGNORED
        if self.exclude_first:
            counted[:, 0] = False
            if state.info.separator is not None:
                counted &= rows.inputs != state.info.separator
        return Said(output.logits[where] if states is None else states[where], output.logits[where], counted)

    @property
    def num_rows(self) -> int:
        """General rows of a step."""
        return 0 if self.general is None or not self.is_begun else min(self.general_batch_size, len(self.general))

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if self.num_rows and self.tap is not None:
            self.tap.open(state.model)
        rows = partial(self._next, state)
        return added(state, batch, self.num_rows, rows, Source.ANCHOR, self.name, self.general_weight)

    def _next(self, state: TrainState) -> Batch:
        """The next general rows of an order that is drawn anew each time all of them were there."""
        numbers: list[int] = []
        total = len(self.general)
        while len(numbers) < self.num_rows:
            turn, place = divmod(self.drawn, total)
            order = torch.randperm(total, generator=state.seeds.fresh(self.name, "general", turn))
            some = order[place : place + self.num_rows - len(numbers)].tolist()
            numbers += some
            self.drawn += len(some)
        return state.prepare(self.general[torch.tensor(numbers)])

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if not self.imitates or not self.kept:
            return None
        if self.weight == "dynamic":
            self.label_loss.note(state, state.label_loss(output, batch))
        if not is_last(state):
            return None
        (part,) = batch.parts_of(self.name)
        rows = batch[part.rows]
        kept = {name: value[rows.sample_ids] for name, value in self.kept.items()}
        total, count = self.imitation.terms(self._on(state, rows, output, part.rows), kept, self.fitted)
        if part.share == 0:  # a row that another process works on
            total, count = 0.0 * total, 0 * count
        distance = state.world.pooled(total, count)
        return self._factor(state, distance) * distance / state.share

    def _factor(self, state: TrainState, distance: Tensor) -> Tensor | float:
        """w, for the whole step."""
        if self.weight != "dynamic":
            return self.weight
        step = state.world.mean({"labels": self.label_loss.total(), "distance": distance.detach()})
        return step["labels"] / (step["distance"] + 1e-8)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.tap is not None:
            self.tap.close()

    def on_experience_end(self, state: TrainState) -> None:
        """Measure how many codes are no longer those of the original model: what the margin loss is to prevent."""
        if "codes" not in self.kept:
            return
        flipped, total, low = 0, 0, 0
        for said in self._said(state):
            now = self.imitation.kept(said, self.fitted)["codes"]
            was, low = self.kept["codes"][low : low + len(now)], low + len(now)
            width = said.states.shape[-1]
            flipped += int((unpacked(now, width) != unpacked(was, width))[said.counted].sum())
            total += int(said.counted.sum()) * width
        state.note("code_flips", flipped / max(1, total))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        rows = [] if self.general is None else [self.general.inputs, self.general.targets]
        return Cost(self.num_rows, self.num_rows, tensor_bytes(self.kept, self.fitted, rows))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "fitted": self.fitted, "drawn": self.drawn, "is_begun": self.is_begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.fitted = copied(state["kept"]), copied(state["fitted"])
        self.drawn, self.is_begun = state["drawn"], state["is_begun"]
