"""RECALL: merge the models of all experiences layer by layer, by how alike they represent what the new one saw.

    every experience is trained from the same start;  theta_m: weights after experience m
    when experience t ends:  typical rows = those nearest to the centres of k-means on the last hidden layer of theta_t
                             s_m^l = mean over typical rows of exp(-|h_t^l - h_m^l|^2 / (2 sigma_l^2))
                             a_m^l = softmax over m of s_m^l / temperature
                             theta^l = sum over m of a_m^l theta_m^l

A layer that all models represent alike is averaged; one in which they differ stays closer to the new model: in practice
shallow layers are shared and deep ones specific, which is the hierarchy of the paper's title.

Source: Wang et al., "RECALL: REpresentation-aligned Catastrophic-forgetting ALLeviation via Hierarchical Model
Merging", EMNLP 2025. The code could not be obtained, so these are choices of ours: the RBF kernel takes sigma_l^2 as
the mean squared distance between different rows of h_t^l; a layer is a stage of the backbone, and the head, whose
representation are its logits; the same start is the network after the first experience, under a new optimizer, since
models that share no start cannot be averaged; `start=merged` goes on from what was merged last instead. The paper
merges language models that were finetuned from one pretrained model. Heads of single tasks are taken from the model
that trained them; running statistics are averaged as weights are.

Shape legend: N rows, F width of a layer's representation, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cl.backbones import MultiHead
from cl.buffers.base import draw_without_replacement
from cl.core import Batch, StreamInfo
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._backbone import in_float, require_backbone, require_own_weights
from strategies._checks import require, require_choice, require_count, require_number
from strategies._modes import evaluation_mode
from strategies._quadratic import Vectors, copied
from strategies.update_periods import require_no_carry

STARTS = ("first", "merged")
NEEDS = "stages"
ITERATIONS = 20


class RecallMerge(Strategy):
    """Merge the models of all experiences by their representations.

    Args:
        temperature: of the softmax; large averages all models alike, small takes the new one where they differ.
        clusters: of k-means, 2 at least; as many typical rows are compared.
        num_rows: rows of the new experience that are clustered.
        start: experiences are trained from the network after the "first" one, or from what was "merged" last.

    Raises:
        UserError: a value outside its range, a model that is no backbone of this platform, or with start="first" a
            strategy beside it that carries gradients on.

    Cost: no rows in a step; num_rows rows, and clusters rows for each model, forward when an experience ends. One copy
    of the network is kept for each experience.
    """

    moves_weights = True
    contract = Contract(
        toy={"clusters": 20, "num_rows": 100, "start": "merged"},
        why_not_zero="models are merged at the end of every experience, whatever the arguments are",
        forgets_less_by=0.1,
    )

    def __init__(
        self, temperature: float = 1.0, clusters: int = 20, num_rows: int = 1000, start: str = "first"
    ) -> None:
        require_number("recall_merge.temperature", temperature, above=0.0)
        require_count("recall_merge.clusters", clusters)
        require_count("recall_merge.num_rows", num_rows)
        for name, count in (("clusters", clusters), ("num_rows", num_rows)):
            # the width of the kernel is how far rows are from each other
            require(count >= 2, f"recall_merge.{name}", count, "an integer of at least 2")
        require_choice("recall_merge.start", start, STARTS)
        self.temperature, self.clusters, self.num_rows, self.start = temperature, clusters, num_rows, start
        self.models: list[Vectors] = []
        """Everything in the model's state, after each experience."""

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        if self.start == "first":
            require_no_carry(self, strategies, "puts back")

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        require_own_weights(require_backbone(model, self.name, NEEDS), self.name)

    def on_experience_start(self, state: TrainState) -> None:
        if self.start == "first" and self.models:
            heads = _of_single_tasks(state.model)
            state.optimizer.state.clear()
            now = state.model.state_dict()
            _write(state.model, {k: now[k] if k in heads else value for k, value in self.models[0].items()})

    def on_experience_end(self, state: TrainState) -> None:
        self.models.append(copied(state.model.state_dict()))
        if len(self.models) == 1:
            return
        rows = self._typical(state)
        layers = self._layers(state)
        seen = [self._representations(state, rows, model) for model in self.models]
        weights = {}
        for number, name in enumerate([*layers, "head"]):
            alike = torch.stack([similarity(seen[-1][number], each[number]) for each in seen])
            weights[name] = (alike / self.temperature).softmax(0)
            state.note(f"{name}_own", float(weights[name][-1]))
        _write(state.model, self._merged(state, layers, weights))

    @property
    def seals(self) -> str:
        return "merged the models"

    def _typical(self, state: TrainState) -> Batch:
        """Rows of the new experience that are nearest to the centres of its last hidden layer."""
        draws = state.seeds.named(self.name)
        index = draw_without_replacement(len(state.data), min(self.num_rows, len(state.data)), draws)
        rows = state.prepare(state.data.rows(index))
        with torch.no_grad(), evaluation_mode(state.model):
            hidden_NF = in_float(state.forward(rows).features)
        nearest = distances(centres(hidden_NF, min(self.clusters, len(index)), draws), hidden_NF).argmin(1)
        return rows[nearest.unique()]

    def _layers(self, state: TrainState) -> dict[str, set[str]]:
        """Names of the state's entries that belong to each stage."""
        backbone = require_backbone(state.model, self.name, NEEDS)
        owner = {id(each): name for name, each in (*state.model.named_parameters(), *state.model.named_buffers())}
        return {
            f"stage_{number}": {
                owner[id(each)] for m in stage.modules for each in (*m.parameters(), *m.buffers()) if id(each) in owner
            }
            for number, stage in enumerate(backbone.stages())
        }

    def _representations(self, state: TrainState, rows: Batch, model: Vectors) -> list[Tensor]:
        """(N, F) what a model makes of rows in every stage, and in its head."""
        found: list[Tensor] = []
        with torch.no_grad(), evaluation_mode(state.model), _Hearing(state.model, found):
            output = state.forward(rows, lambda batch: functional_call(state.model, model, (batch,)))
        return [*found, in_float(output.logits.flatten(1))]

    def _merged(self, state: TrainState, layers: dict[str, set[str]], weights: dict[str, Tensor]) -> Vectors:
        layer_of = {entry: name for name, entries in layers.items() for entry in entries}
        heads = _of_single_tasks(state.model)
        merged = {}
        for entry, own in self.models[-1].items():
            if entry in heads or not own.is_floating_point():
                merged[entry] = own
                continue
            share_M = weights[layer_of.get(entry, "head")].to(own)
            merged[entry] = sum(share * model[entry] for share, model in zip(share_M, self.models, strict=True))
        return merged

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.models))

    def state_dict(self) -> dict[str, Any]:
        return {"models": [dict(model) for model in self.models]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.models = [copied(model) for model in state["models"]]


def similarity(own_NF: Tensor, other_NF: Tensor) -> Tensor:
    """Mean of an RBF kernel between two representations of the same rows; 1 where they are the same.

    Example:
        >>> rows = torch.tensor([[0.0], [2.0]])
        >>> similarity(rows, rows).item(), round(similarity(rows, rows + 2).item(), 4)
        (1.0, 0.6065)
    """
    # the mean squared distance of two rows is twice their variance, which is exact far from zero too
    apart = 2 * own_NF.var(0, correction=min(1, len(own_NF) - 1)).sum()
    distance_N = (own_NF - other_NF).square().sum(1)
    return torch.exp(-distance_N / (2 * apart).clamp(min=1e-12)).mean()


def distances(a_NF: Tensor, b_KF: Tensor) -> Tensor:
    """(N, K), from differences: products of rows far from zero have no digits left for what is between them."""
    return torch.cdist(a_NF, b_KF, compute_mode="donot_use_mm_for_euclid_dist")


def centres(rows_NF: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres (count, F) of k-means, begun at random rows; a cluster that runs empty keeps its centre."""
    centres_KF = rows_NF[torch.randperm(len(rows_NF), generator=generator)[:count].to(rows_NF.device)]
    for _ in range(ITERATIONS):
        member_NK = F.one_hot(distances(rows_NF, centres_KF).argmin(1), count).to(rows_NF)
        size_K1 = member_NK.sum(0).unsqueeze(1)
        centres_KF = torch.where(size_K1 > 0, member_NK.T @ rows_NF / size_K1.clamp(min=1), centres_KF)
    return centres_KF


def _of_single_tasks(model: nn.Module) -> set[str]:
    """Entries of the state that belong to heads of single tasks."""
    names = [name for name, module in model.named_modules() if isinstance(module, MultiHead)]
    return {entry for entry in model.state_dict() for name in names if entry.startswith(f"{name}.")}


def _write(model: nn.Module, values: Vectors) -> None:
    with torch.no_grad():
        for name, entry in model.state_dict(keep_vars=True).items():
            entry.copy_(values[name])


class _Hearing:
    """Collects what the stages of the backbone in a model put out, in order, while inside."""

    def __init__(self, model: nn.Module, found: list[Tensor]) -> None:
        self.backbone = require_backbone(model, "recall_merge", NEEDS)
        self.found = found
        self.before = dict(self.backbone.between)

    def _note(self, number: int) -> Any:
        earlier = self.before.get(number)

        def hear(hidden: Tensor) -> Tensor:
            hidden = hidden if earlier is None else earlier(hidden)
            self.found.append(in_float(hidden.flatten(1)))
            return hidden

        return hear

    def __enter__(self) -> None:
        for number in range(1, len(self.backbone.stages()) + 1):
            self.backbone.between[number] = self._note(number)

    def __exit__(self, *problem: Any) -> None:
        self.backbone.between.clear()
        self.backbone.between.update(self.before)
