"""Replay with two distillations from the model of the last experience: features of stored rows, predictions of all.

    loss = (1 - a) CE(all rows) + a MSE(h(x), h_old(x); stored rows) + k T^2 KL(old || new)
    a = sqrt(n_stored / n)        n rows of the step, n_stored of them from the buffer
    k = log(1 + C_old / C_seen)   predictions="all": over rows and old classes, mean of both (n * C_old entries)
    k = sqrt(n_stored / n)        predictions="replayed": over stored rows only

CE is one mean over all rows. With only one of the two distillations, 1 - a or 1 - k is the factor of CE. KL compares
probabilities over the outputs of earlier experiences, `old` being the model at the end of the last one.

Source: Cappellazzo et al., "An Investigation of the Combination of Rehearsal and Knowledge Distillation in Continual
Learning for Spoken Language Understanding", Interspeech 2023 (umbertocappellazzo/CL_SLU main.py, tools/utils.py).
Differences: stored rows are drawn beside every batch; there they are mixed into the data of the experience, so that n
and n_stored vary. `features="all"` takes a = log(1 + C_old / C_seen) in every step; there the logarithm is taken anew
in every batch, a <- log(1 + a), and features fade out of the loss. Where old and new classes are the same (domains),
k is log 2.

Shape legend: B rows, C outputs of one head, F width of the last hidden layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.core import Batch, Output, Setting, Stream, StreamInfo, UserError
from cl.hooks import Contract
from cl.state import Cost, TrainState
from strategies._backbone import Teacher, in_float, require_backbone
from strategies._checks import require_choice, require_number
from strategies._pooled import lighter
from strategies.replay import Replay

ROWS = ("none", "replayed", "all")


class ReplayDistillation(Replay):
    """Replay stored rows, and keep their features and everybody's old predictions.

    Args:
        capacity: rows stored; filled at the end of every experience, the same number of each class.
        replay_batch_size: rows replayed per step; None takes as many as the step has of the stream.
        features: rows whose features are distilled: none, replayed or all.
        predictions: rows whose predictions are distilled: none, replayed or all.
        temperature: paper's tau.
        strength: factor of both a and k; 1 is published, 0 is plain replay.

    Cost: replay_batch_size more rows forward and backward per step, and all distilled rows through the teacher.
    """

    settings = frozenset({Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL})
    contract = Contract(
        toy={"capacity": 100},
        why_not_zero="without distillation it is replay, which the oracle compares it with",
        forgets_less_by=0.25,
    )

    def __init__(
        self,
        capacity: int = 200,
        replay_batch_size: int | None = None,
        features: str = "replayed",
        predictions: str = "all",
        temperature: float = 1.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__(capacity, replay_batch_size, policy="class_balanced", update="experience_end", average="row")
        require_choice("replay_distillation.features", features, ROWS)
        require_choice("replay_distillation.predictions", predictions, ROWS)
        require_number("replay_distillation.temperature", temperature, above=0.0)
        require_number("replay_distillation.strength", strength)
        if strength > 1:
            raise UserError(f"replay_distillation.strength is {strength!r}; it must be between 0 and 1")
        self.features = features if strength else "none"
        self.predictions = predictions if strength else "none"
        self.is_all = "all" in (self.features, self.predictions)
        self.temperature, self.strength = temperature, strength
        self.teacher = Teacher()
        self.old_outputs: list[int] = []

    def check(self, stream: Stream) -> None:
        super().check(stream)
        # old classes, and where these are compared with all of them those of the last experience too
        for experience in list(stream.experiences)[: None if self.is_all else -1]:
            if not experience.classes and (self.is_all or self.predictions != "none"):
                raise UserError(
                    f"replay_distillation distils the outputs of old classes and counts them, and experience "
                    f"{experience.id} ({experience.name!r}) of stream {stream.info.name} does not say which classes it "
                    "brings"
                )

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        if self.features != "none":
            require_backbone(model, self.name, "features")

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        return lighter(super().on_batch(state, batch), self._taken_from_labels(state))

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if not self.teacher:
            return None
        rows = self._rows(batch)
        if len(rows) == 0:
            return None
        num_stored = sum(map(len, batch.parts_of(self.name)))
        old = self.teacher(state, batch[rows])
        terms = []
        for what, function in ((self.features, self._feature_distance), (self.predictions, self._divergence)):
            if what == "all" or (what == "replayed" and num_stored):
                # stored rows come last
                some = slice(len(rows) - num_stored, None) if what == "replayed" else slice(None)
                factor = self.spread.factor if what == "replayed" else self._part_of_all(state, batch, num_stored)
                terms.append(self._share(what, state) * factor * function(output, old, rows, some))
        return sum(terms[1:], start=terms[0]) if terms else None

    def _part_of_all(self, state: TrainState, batch: Batch, num_stored: int) -> float:
        """What a mean over the rows of a micro-batch counts in that over all rows of the step."""
        return (batch.num_current + num_stored) / (state.step_rows + self.num_drawn(state.step_rows)) / state.share

    def _rows(self, batch: Batch) -> Tensor:
        """Numbers of the rows that the teacher sees, the stored ones last."""
        pieces = [torch.arange(part.start, part.stop) for part in batch.parts_of(self.name)]
        return torch.cat([torch.arange(batch.num_current if self.is_all else 0), *pieces]).to(batch.inputs.device)

    def _feature_distance(self, new: Output, old: Output, rows: Tensor, some: slice) -> Tensor:
        return F.mse_loss(in_float(new.features[rows][some]), in_float(old.features[some]))

    def _divergence(self, new: Output, old: Output, rows: Tensor, some: slice) -> Tensor:
        """T^2 KL(softmax(old / T) || softmax(new / T)) over old outputs, mean over rows and outputs."""
        new_BC, old_BC = (
            (in_float(logits[some][:, self.old_outputs]) / self.temperature).log_softmax(-1)
            for logits in (new.logits[rows], old.logits)
        )
        return self.temperature**2 * F.kl_div(new_BC, old_BC, reduction="sum", log_target=True) / new_BC.numel()

    # the factors a and k

    def _share(self, rows: str, state: TrainState) -> float:
        if rows == "none" or not self.teacher:
            return 0.0
        if rows == "all":
            return self.strength * math.log1p(len(self.old_outputs) / len(state.classes_seen))
        num_stored = self.num_drawn(state.step_rows)
        return self.strength * math.sqrt(num_stored / (state.step_rows + num_stored))

    def _taken_from_labels(self, state: TrainState) -> float:
        """What the label loss gives up: a where features are distilled, k where only predictions are."""
        return self._share(self.features if self.features != "none" else self.predictions, state)

    def on_experience_end(self, state: TrainState) -> None:
        super().on_experience_end(state)
        if "none" == self.features == self.predictions:
            return
        self.teacher.take(state)
        self.old_outputs = sorted({*self.old_outputs, *state.experience.classes})

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        if not self.teacher:
            return super().cost(state, batch_size)
        distilled = self.num_drawn(batch_size) + (batch_size if self.is_all else 0)
        return super().cost(state, batch_size) + Cost(distilled, 0, self.teacher.num_bytes)

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": super().state_dict(),
            "teacher": self.teacher.state_dict(),
            "old_outputs": self.old_outputs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["buffer"])
        self.teacher.load_state_dict(state["teacher"])
        self.old_outputs = list(state["old_outputs"])
