"""Prototype-sample relation distillation: a contrastive network whose similarities to old prototypes are kept.

    loss = SupCon(g(h(x))) + prototype_weight * L_p + distill_weight * L_d
    L_p = mean over rows of (1 - cos(stop_gradient(h(x)), p_y))
    L_d = sum over old experiences k of KL(softmax(s_old) || softmax(s_new)),  mean over rows
    s = h(x) . p_c / |p_c|   for the classes c of experience k

h is what the head of the backbone would read, g a projection of two layers, p one prototype for each class of each
head. No row is stored: `old` are network and prototypes at the end of the last experience, asked about current rows.
Prediction: the class with the largest cosine of h(x) and its prototype, among those seen.

Source: Asadi et al., "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning", ICML 2023, in
the form of naderAsadi/Probing-Continual-Learning methods/repe.py: softmax over the classes of an experience, for every
row (the paper's words could also mean over rows). The paper has no domain-incremental form.
Differences: the teacher predicts in evaluation mode. SupCon has no factor temperature / 0.07, and the projection no
batch norm. Streams that augment show every row in two views, the others in one, since a copy teaches nothing.

Shape legend: B rows, C outputs of one head, H heads, F width of the last hidden layer, P width of the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.core import Batch, Output, Setting, Source, Stream, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState
from strategies._backbone import Teacher, in_float, require_backbone, require_own_weights
from strategies._checks import require_count, require_number
from strategies._contrastive import global_labels, supervised_contrastive


class PrototypeNet(nn.Module):
    """A backbone with a projection and prototypes in place of its head."""

    def __init__(self, backbone: nn.Module, info: StreamInfo, projection: int) -> None:
        super().__init__()
        width = require_backbone(backbone, "prd", "features").num_features
        self.backbone = backbone
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        self.prototypes_HCF = nn.Parameter(torch.randn(info.num_heads, info.num_outputs, width) / width**0.5)
        self.to(next(backbone.parameters()).dtype)

    def forward(self, batch: Batch) -> Output:
        output: Output = self.backbone(batch)
        prototypes_BCF = F.normalize(self.prototypes_HCF, dim=2)[batch.heads]
        return replace(output, logits=torch.einsum("bf,bcf->bc", output.features, prototypes_BCF))


class Prd(Strategy):
    """Keep what the last network said of how close current rows are to old prototypes.

    Args:
        prototype_weight: factor of L_p.
        distill_weight: factor of L_d; 0 keeps no teacher.
        temperature: of the contrastive loss.
        projection: width of what the contrastive loss compares.

    Cost: current rows once more forward and backward where the stream augments; all of these once more through the
    teacher from the second experience on.
    """

    settings = frozenset({Setting.TASK_INCREMENTAL, Setting.CLASS_INCREMENTAL})
    contract = Contract(
        why_not_zero="its loss and its classifier are others than naive's, whatever the factors are",
        why_not_cut="its contrastive loss compares the rows of a micro-batch with each other",
        forgets_less_by=0.1,
    )

    def __init__(
        self,
        prototype_weight: float = 2.0,
        distill_weight: float = 4.0,
        temperature: float = 0.1,
        projection: int = 128,
    ) -> None:
        require_number("prd.prototype_weight", prototype_weight, above=0.0)
        require_number("prd.distill_weight", distill_weight)
        require_number("prd.temperature", temperature, above=0.0)
        require_count("prd.projection", projection)
        self.prototype_weight, self.distill_weight = prototype_weight, distill_weight
        self.temperature, self.projection = temperature, projection
        self.teacher = Teacher()
        self.groups: list[list[int]] = []
        """Head and classes of every past experience; the same ones are kept once."""

    def check(self, stream: Stream) -> None:
        for experience in list(stream.experiences)[:-1]:
            if not experience.classes:
                raise UserError(
                    f"prd distils similarities to the classes of old experiences, and experience {experience.id} "
                    f"({experience.name!r}) of stream {stream.info.name} does not say which classes it brings"
                )

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        return PrototypeNet(backbone, info, self.projection)

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        require_own_weights(self._net(model)[1], "prd")

    def make_optimizer(self, module: nn.Module, default: Callable[[Iterable[Any]], Optimizer]) -> Optimizer:
        """As the run asks for, but prototypes without momentum and weight decay."""
        prototypes = self._net(module)[1].prototypes_HCF
        others = [p for p in module.parameters() if p is not prototypes]
        return default([{"params": others}, {"params": [prototypes], "momentum": 0.0, "weight_decay": 0.0}])

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        current, *others = batch.parts
        if state.stream.augment is not None:
            rows = batch.current()
            stored = replace(rows, inputs=rows.stored, raw=None)
            view = state.prepare(stored, state.seeds.named(self.name))
            batch = batch.extended(view, Source.CURRENT, self.name, weight=0.0)
            others = list(batch.parts[1:])
        return replace(batch, parts=(replace(current, weight=0.0), *others))

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        rows = self._rows(batch)
        seen, hidden_BF = batch[rows], in_float(output.features[rows])
        path, net = self._net(state.model)
        with state.autocast():
            projected_BP = net.projector(output.features[rows])
        loss = supervised_contrastive(projected_BP, global_labels(seen, state.info), self.temperature)
        loss = loss + self.prototype_weight * self._apart(net, seen, hidden_BF.detach())
        if self.teacher:
            old_HCF = self.teacher.vectors[f"{path}prototypes_HCF"]
            old_BF = in_float(self.teacher(state, seen).features)
            for head, *classes in self.groups:
                new_BC, old_BC = (
                    (hidden @ F.normalize(prototypes[head, classes], dim=1).T).log_softmax(1)
                    for hidden, prototypes in ((hidden_BF, net.prototypes_HCF), (old_BF, old_HCF))
                )
                loss = loss + self.distill_weight * F.kl_div(new_BC, old_BC, reduction="batchmean", log_target=True)
        return loss

    def _rows(self, batch: Batch) -> Tensor:
        """Numbers of the current rows and of their second views."""
        pieces = [torch.arange(part.start, part.stop) for part in (batch.parts[0], *batch.parts_of(self.name))]
        return torch.cat(pieces).to(batch.inputs.device)

    def _apart(self, net: PrototypeNet, rows: Batch, hidden_BF: Tensor) -> Tensor:
        """L_p: only prototypes learn from it."""
        own_BF = net.prototypes_HCF[rows.heads, rows.targets]
        return (1 - F.cosine_similarity(hidden_BF, own_BF, dim=1)).mean()

    def _net(self, model: nn.Module) -> tuple[str, PrototypeNet]:
        """The prototypes' module inside a model, and the prefix of its parameters' names."""
        path, net = next((path, m) for path, m in model.named_modules() if isinstance(m, PrototypeNet))
        return f"{path}." if path else "", net

    def on_experience_end(self, state: TrainState) -> None:
        if self.distill_weight == 0:
            return
        self.teacher.take(state)
        group = [state.experience.task_id or 0, *state.experience.classes]
        if group not in self.groups:
            self.groups.append(group)

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        with state.autocast():
            output = state.model(batch)
        is_unseen = torch.ones(state.info.num_outputs, dtype=torch.bool, device=output.logits.device)
        is_unseen[list(state.classes_seen) if state.info.num_heads == 1 and state.classes_seen else slice(None)] = False
        cosine_BC = output.logits / output.features.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return Output(cosine_BC.masked_fill(is_unseen, -2.0), output.hidden)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        views = batch_size if state.stream.augment is not None else 0
        distilled = batch_size + views if self.teacher else 0
        return Cost(views + distilled, views, self.teacher.num_bytes)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "groups": self.groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self.groups = [list(group) for group in state["groups"]]
