"""iCaRL: features learnt from new rows and a few exemplars, classes told by the nearest mean of their exemplars.

    loss = mean over rows and classes seen of BCE(sigmoid(logit_c), target_c)
    target_c = sigmoid(old logit_c) for classes of earlier experiences, [y = c] for those of the running one
    p_k = argmin_x | mu - (phi(x) + sum_{j<k} phi(p_j)) / k |            (herding: exemplars of a class, in order)
    prediction = argmin_c | phi(x) - mean of c's exemplars |

phi is the input of the head divided by its length, in evaluation mode; means are divided by their length too. `old` is
the model at the end of the last experience. After an experience every class seen keeps the first capacity // classes of
its exemplars.

Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017. The loss is the variant
of mammoth (models/icarl.py) and Avalanche (training/losses.py): old outputs are distilled on all rows, exemplars
included, whose own label therefore does not enter; the mean is over classes too, where the paper sums.
Differences: the paper trains on one shuffled union of rows and exemplars; here every batch of the stream gets the share
of exemplars that the union would have (`replay_batch_size=None`). Herding takes no row twice, as in the paper's code
and mammoth; Avalanche herds by inner products. Both average means over mirrored images, mammoth since its commit
eec9466 (2024), before which it did not normalise features. Until the classes of the running experience have exemplars,
at its end, the outputs decide. A class that comes back is new again, and its exemplars are chosen anew.

Shape legend: B rows, C outputs, N rows of a class, F width of the last hidden layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cl.buffers.base import draw_without_replacement, stored_rows
from cl.core import Batch, Output, Setting, Source, Stream, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_count
from strategies._modes import evaluation_mode
from strategies._pooled import Spread
from strategies._quadratic import Vectors, copied, snapshot

COLUMNS = ("inputs", "targets", "experience_id", "sample_ids")


class Icarl(Strategy):
    """Herd exemplars, distil old outputs, classify by the nearest mean.

    Args:
        capacity: paper's K, exemplars of all classes together.
        replay_batch_size: exemplars per step; None takes as many as the union of rows and exemplars would have.

    Raises:
        UserError: fewer exemplars than classes, experiences that do not say which classes they bring, or a backbone
            that does not return the features before the head.

    Cost: per step replay_batch_size more rows forward and backward, and a forward pass of all rows for the old outputs,
    from the second experience on; at the end of an experience one forward pass over its rows. Evaluation: a forward
    pass over the exemplars.
    """

    settings = frozenset({Setting.CLASS_INCREMENTAL})
    contract = Contract(
        toy={"capacity": 60},
        why_not_zero="it replaces the label loss and the classifier",
        forgets_less_by=0.3,
        acts_at_once=True,
    )

    def __init__(self, capacity: int = 2000, replay_batch_size: int | None = None) -> None:
        require_count("icarl.capacity", capacity)
        require_count("icarl.replay_batch_size", replay_batch_size, none_means="the share of the exemplars in all rows")
        self.capacity, self.replay_batch_size = capacity, replay_batch_size
        self.exemplars: dict[int, Vectors] = {}
        self.teacher: Vectors = {}
        self.spread = Spread()
        self._pool: Batch | None = None
        self._means: tuple[int, Tensor] | None = None

    def check(self, stream: Stream) -> None:
        super().check(stream)
        for experience in stream.experiences:
            if not experience.classes:
                raise UserError(
                    f"icarl tells old classes from new ones, and experience {experience.id} ({experience.name!r}) of "
                    f"stream {stream.info.name} does not say which classes it brings; take a stream that does"
                )
        num = len({c for experience in stream.experiences for c in experience.classes})
        allowed = f"at least {num}, one exemplar for each class of the stream"
        require(self.capacity >= num, "icarl.capacity", self.capacity, allowed)

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        """One row of zeros goes forward."""
        like = next(model.parameters())
        row, zero = torch.zeros(1, *info.input_shape, dtype=like.dtype), torch.zeros(1, dtype=torch.int64)
        with torch.inference_mode(), evaluation_mode(model):
            output = model(Batch(row, zero, zero, zero).to(like.device))
        if output.hidden is None:
            raise UserError(
                f"icarl classifies by the features before the head, and the backbone {type(model).__name__} returns "
                "none (`Output.hidden`); take one that does"
            )

    def num_drawn(self, state: TrainState, batch_size: int) -> int:
        """Exemplars beside so many rows of the stream."""
        kept = sum(len(columns["targets"]) for columns in self.exemplars.values())
        if kept == 0:
            return 0
        share = self.replay_batch_size or math.ceil(batch_size * kept / len(state.data))
        return min(kept, share)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        # the strategy owns the loss of the stream's rows too
        owned = replace(batch, parts=(replace(batch.parts[0], weight=0.0), *batch.parts[1:]))
        if self.num_drawn(state, state.step_rows) == 0:
            return owned
        (rows,) = self.spread.shown(state, batch, lambda: self._drawn(state))
        return owned.extended(rows, Source.REPLAY, self.name, weight=0.0)

    def _drawn(self, state: TrainState) -> tuple[Batch]:
        """Exemplars of a step."""
        generator, pool = state.seeds.named(self.name), self._all()
        index = draw_without_replacement(len(pool), self.num_drawn(state, state.step_rows), generator)
        return (state.prepare(pool[index], generator),)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor:
        parts = [batch.parts[0], *batch.parts_of(self.name)]
        rows = batch.current() if len(parts) == 1 else Batch.cat([batch[part.rows] for part in parts])
        logits_BC = torch.cat([output.logits[part.rows] for part in parts]).float()
        seen = sorted(state.classes_seen)
        targets_BC = self._targets(state, rows, logits_BC)
        num_rows = state.step_rows + self.num_drawn(state, state.step_rows)
        factor = len(rows) / num_rows / state.share
        return factor * F.binary_cross_entropy_with_logits(logits_BC[:, seen], targets_BC[:, seen])

    def _targets(self, state: TrainState, rows: Batch, like: Tensor) -> Tensor:
        """What every output should say: labels for classes of the experience, the old model's outputs for others."""
        targets_BC = F.one_hot(rows.targets, like.shape[1]).to(like.dtype)
        old = [c for c in self.exemplars if c not in state.experience.classes]
        if self.teacher and old:
            with torch.no_grad(), evaluation_mode(state.model):
                said = state.forward(rows, lambda batch: functional_call(state.model, self.teacher, (batch,)))
            targets_BC[:, old] = said.logits[:, old].to(like.dtype).sigmoid()
        return targets_BC

    def on_experience_end(self, state: TrainState) -> None:
        size = self.capacity // len(state.classes_seen)
        for columns in self.exemplars.values():
            columns.update({name: column[:size].clone() for name, column in columns.items()})
        features_NF, targets_N = self._features_of_experience(state)
        for c in state.experience.classes:
            index = (targets_N == c).nonzero().squeeze(1)
            if len(index):
                chosen = state.data.rows(index[herded(features_NF[index], size)])
                self.exemplars[c] = {name: getattr(chosen, name).clone() for name in COLUMNS}
        buffers = {name: buffer.detach().clone() for name, buffer in state.model.named_buffers()}
        self.teacher = snapshot(state) | buffers
        self._pool = self._means = None

    def _features_of_experience(self, state: TrainState) -> tuple[Tensor, Tensor]:
        """Normalised features and labels of every row, on the CPU."""
        found = []
        with torch.no_grad(), evaluation_mode(state.model):
            for rows in stored_rows(state.data):
                features = normalised(state.forward(state.prepare(rows)).features)
                found.append((features.cpu(), rows.targets.cpu()))
        return torch.cat([features for features, _ in found]), torch.cat([targets for _, targets in found])

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        if not self.exemplars or not set(state.classes_seen) <= self.exemplars.keys():
            return None
        with state.autocast():
            output = state.model(batch)
        means_CF = self._class_means(state, output.logits.shape[1])
        distance_BC = (normalised(output.features)[:, None, :] - means_CF).square().sum(-1)
        return Output(-distance_BC.nan_to_num(nan=math.inf), output.hidden)

    def _class_means(self, state: TrainState, num_outputs: int) -> Tensor:
        """(C, F) means of the exemplars under the model as it is now, NaN where a class has none."""
        if self._means is None or self._means[0] != state.step:
            means: dict[int, Tensor] = {}
            with evaluation_mode(state.model):
                for c, columns in self.exemplars.items():
                    pieces = [self._features(state, rows) for rows in _batches(_rows(columns))]
                    means[c] = normalised(torch.cat(pieces).mean(0, keepdim=True))[0]
            like = next(iter(means.values()))
            none = torch.full_like(like, math.nan)
            self._means = state.step, torch.stack([means.get(c, none) for c in range(num_outputs)])
        return self._means[1]

    def _features(self, state: TrainState, rows: Batch) -> Tensor:
        # not through `state.forward`: evaluation is not training work
        with state.autocast():
            return normalised(state.model(state.prepare(rows)).features)

    def _all(self) -> Batch:
        """Every exemplar, as it was stored."""
        if self._pool is None:
            self._pool = Batch.cat([_rows(columns) for columns in self.exemplars.values()])
        return self._pool

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        drawn = self.num_drawn(state, batch_size)
        has_old = self.teacher and set(self.exemplars) - set(state.experience.classes)
        asked = batch_size + drawn if has_old else 0
        return Cost(drawn + asked, drawn, tensor_bytes(self.exemplars, self.teacher))

    def state_dict(self) -> dict[str, Any]:
        return {"exemplars": self.exemplars, "teacher": self.teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # beside the rows of the stream, which are on the CPU
        kept = ((c, copied(columns)) for c, columns in state["exemplars"].items())
        self.exemplars = {c: {name: value.cpu() for name, value in columns.items()} for c, columns in kept}
        self.teacher = copied(state["teacher"])
        self._pool = self._means = None


def normalised(features_NF: Tensor) -> Tensor:
    """Rows divided by their length, in float32 or better."""
    return F.normalize(features_NF.to(torch.promote_types(features_NF.dtype, torch.float32)), dim=-1)


def herded(features_NF: Tensor, size: int) -> Tensor:
    """Rows whose mean stays nearest to the mean of all, one after the other and none twice; all of them when fewer.

    Cost: O(size * N * F).

    Example:
        >>> herded(torch.tensor([[0.0], [1.0], [2.0], [5.0]]), 3).tolist()
        [2, 1, 3]
    """
    mean_F, total_F = features_NF.mean(0), torch.zeros_like(features_NF[0])
    is_free = torch.ones(len(features_NF), dtype=torch.bool)
    chosen: list[int] = []
    for k in range(1, min(size, len(features_NF)) + 1):
        distance_N = (mean_F - (features_NF + total_F) / k).square().sum(1)
        best = int(distance_N.where(is_free, torch.inf).argmin())
        chosen.append(best)
        is_free[best] = False
        total_F = total_F + features_NF[best]
    return torch.tensor(chosen, dtype=torch.int64)


def _rows(columns: Vectors) -> Batch:
    """Exemplars of a class, as they were stored."""
    return Batch(columns["inputs"], columns["targets"], columns["experience_id"], columns["sample_ids"])


def _batches(rows: Batch, size: int = 500) -> Iterator[Batch]:
    for low in range(0, len(rows), size):
        yield rows[low : low + size]
