"""HyperInterval (HINT): tasks are boxes of embeddings, whose weights must all solve the task.

    [theta_low, theta_up] = bounds of h over the box of t        interval bound propagation through the generator
    [z_low, z_up]         = bounds of the logits                 the same through the network, on weights in that box
    loss = kappa * CE(z_mid) + (1 - kappa) * CE(z_worst) + beta * mean over old j of |theta*_j - theta_j|^2

z_mid are the logits at the centre of the box; z_worst has the lower logit of the right class and the upper ones of the
others. The penalty looks at low, mid and up, a third each (nested), or at mid only. Within the first part of an
experience kappa falls from 1 and the boxes grow from 0 to their size.
Nested boxes all meet, so one embedding from their intersection generates one set of weights for all tasks, and the
hypernetwork can be dropped (`IntervalNetwork.materialised(None, net.universal())`).

Source: Krukowski et al., "HyperInterval" (v4: "HINT"), arXiv 2405.15444; gmum/HyperInterval.
Differences: mid is generated from the centre of the embedding's box (theirs is the middle of the weights' box); centres
have their full size from the start and only radii grow; the penalty is divided by the number of old tasks once (their
code does it twice); convolutions and batch norm (by running statistics) are bounded too, and inputs may be negative.
The snapshot with the lowest training loss is not searched for. The penalty is soft, so boxes of old tasks may drift:
what holds for every set of weights in a box holds for the box as it is generated now.

Shape legend: B rows, C outputs, N numbers of a generated network, T old conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cl.core import Batch, Output, StreamInfo, UserError
from cl.hooks import Contract
from cl.state import Cost, TrainState, without_absent
from strategies._checks import require, require_choice, require_count, require_number, require_widths
from strategies._hypernet import Hypernetwork
from strategies._hypernet_chunks import ACTIVATIONS, ChunkGenerator
from strategies._hypernet_interval import ANSWERS, IntervalNetwork, worst_case
from strategies._hypernet_strategy import Generating
from strategies._interval import Interval, ends
from strategies._quadratic import Vectors


class HyperInterval(Generating):
    """Train boxes of weights, each generated from a box of embeddings, on their worst case.

    Args:
        epsilon: size of a box: radii of nested boxes are epsilon / embedding.
        kappa: weight of the plain loss in the end; the worst case has the rest.
        ramp: share of an experience's steps in which kappa falls and boxes grow.
        kappa_slope: fall of kappa a step during the ramp, as published (5e-5 with 5000 steps), with a jump to `kappa`
            at its end; None lets it fall evenly to `kappa`.
        nested: boxes whose intersection is never empty; else boxes with free centres and learnt radii.
        answers: "own" box of a row's task, "universal" embedding, or least "entropy"; None takes own where rows have a
            task label, else universal for nested boxes and entropy for others.
        chunk_size, hidden, embedding, chunk_embedding, activation: of the generator, see `hypernet`. Published
            generators are not chunked: chunk_size null.
        beta, penalty_conditions, targets, heads, start, embedding_lr: see `Generating`.

    Cost: every row of the stream once more, forward and backward, while kappa is below 1: a pass with bounds, which is
    two to four times the work of a plain one.
    """

    contract = Contract(
        toy={
            "nested": False,
            "epsilon": 0.02,
            "kappa": 0.8,
            "hidden": (24,),
            "chunk_size": 300,
            "embedding": 32,
            "beta": 0.1,
        },
        why_not_zero="weights are generated, whatever the strength is",
        forgets_less_by=0.15,
    )

    def __init__(
        self,
        epsilon: float = 0.1,
        kappa: float = 0.5,
        ramp: float = 0.5,
        kappa_slope: float | None = None,
        nested: bool = True,
        answers: str | None = None,
        chunk_size: int | None = 2000,
        hidden: Sequence[int] = (50,),
        embedding: int = 24,
        chunk_embedding: int = 16,
        activation: str = "relu",
        beta: float = 0.01,
        penalty_conditions: int | None = None,
        targets: str = "weights",
        heads: str = "one",
        start: str = "backbone",
        embedding_lr: float | None = None,
    ) -> None:
        super().__init__(embedding, beta, False, penalty_conditions, targets, None, heads, start, embedding_lr)
        for name, value in (("epsilon", epsilon), ("kappa", kappa), ("ramp", ramp)):
            require_number(f"{self.name}.{name}", value)
        for name, value in (("kappa", kappa), ("ramp", ramp)):
            require(value <= 1, f"{self.name}.{name}", value, "from 0 to 1")
        if kappa_slope is not None:
            require_number(f"{self.name}.kappa_slope", kappa_slope)
        if answers is not None:
            require_choice(f"{self.name}.answers", answers, ANSWERS)
        require(nested or answers != "universal", f"{self.name}.answers", answers, "own or entropy unless nested=true")
        require_count(f"{self.name}.chunk_size", chunk_size, none_means="the full hypernetwork")
        require_count(f"{self.name}.chunk_embedding", chunk_embedding)
        require_choice(f"{self.name}.activation", activation, tuple(ACTIVATIONS))
        self.epsilon, self.kappa, self.ramp, self.kappa_slope = epsilon, kappa, ramp, kappa_slope
        self.nested, self.answers = nested, answers
        self.chunk_size, self.chunk_embedding, self.activation = chunk_size, chunk_embedding, activation
        self.hidden = require_widths(f"{self.name}.hidden", hidden)

    def make_generator(self, num_numbers: int) -> nn.Module:
        return ChunkGenerator(
            num_numbers, self.embedding, self.chunk_embedding, self.hidden, self.chunk_size, self.activation, True
        )

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        answers = self.answers or ("own" if info.num_heads > 1 else "universal" if self.nested else "entropy")
        if answers == "own" and info.num_heads == 1:
            raise UserError(
                f"{self.name}.answers is 'own', and rows of stream {info.name} have no task label; it must be one of "
                "universal, entropy"
            )
        net = IntervalNetwork(
            backbone,
            info,
            epsilon=self.epsilon,
            nested=self.nested,
            answers=answers,
            conditions=self.table,
            num_conditions=self.num_conditions,
            embedding=self.embedding,
            make=self.make_generator,
            one_head=self.heads == "one",
            keeps_scale=self.start == "backbone",
        )
        net.check(info)
        return net

    # schedules

    def ramped(self, state: TrainState) -> float:
        """Share of the ramp that is done."""
        return min(1.0, state.progress / self.ramp) if self.ramp > 0 else 1.0

    def kappa_at(self, state: TrainState) -> float:
        """Weight of the plain loss in the next step."""
        done = self.ramped(state)
        if done >= 1 or self.kappa_slope is None:
            return 1 - done * (1 - self.kappa)
        steps = state.progress * state.experience_steps[state.experience.id]
        return max(1 - self.kappa_slope * steps, self.kappa)

    # the worst case

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        batch = super().on_batch(state, batch)
        current, *others = batch.parts
        return replace(batch, parts=(replace(current, weight=current.weight * self.kappa_at(state)), *others))

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        pull, kappa = super().penalty(state, batch, output), self.kappa_at(state)
        if kappa >= 1:
            return pull
        rows = batch.current()
        net, share = self.bounded_net(state), self.ramped(state)
        bounds = state.forward(rows, partial(net.bounded, share=share)).logits
        worst = worst_case(bounds, rows.targets)
        worst = without_absent(worst, rows) if state.masks_absent else worst
        loss = (1 - kappa) * F.cross_entropy(worst, rows.targets)
        return loss if pull is None else loss + pull

    def bounded_net(self, state: TrainState) -> IntervalNetwork:
        net = self.net(state.model)
        assert isinstance(net, IntervalNetwork)
        return net

    # old boxes

    @torch.no_grad()
    def take(self, net: Hypernetwork) -> Vectors:
        """Beside what is kept for the centres, the ends of nested boxes."""
        kept = super().take(net)
        if not self.nested:
            return kept
        assert isinstance(net, IntervalNetwork)
        if self.targets == "weights":
            low_TN, up_TN = ends(net.bounds(self.old))
            return kept | {"low": low_TN, "up": up_TN}
        return kept | {"radii": net.radii(self.old)}

    def pull(self, net: Hypernetwork, parameters: Vectors | None = None) -> Tensor:
        """The mean distance of low, mid and up ends of nested boxes; of mid only for others."""
        middle = super().pull(net, parameters)
        if not self.nested:
            return middle
        assert isinstance(net, IntervalNetwork)
        conditions = [self.old[k] for k in self.picked]
        now = ends(net.generator(net.boxes(conditions).detach(), conditions))
        apart = [self.apart(net, *pair) for pair in zip(now, self.wanted_ends(net), strict=True)]
        return (middle + self.beta * sum(apart[1:], start=apart[0])) / 3

    @torch.no_grad()
    def wanted_ends(self, net: IntervalNetwork) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Lower and upper ends (N,) of the boxes of the conditions picked, as they were."""
        if self.targets == "weights":
            return [self.kept["low"][k] for k in self.picked], [self.kept["up"][k] for k in self.picked]
        start = "generator."
        own = {name[len(start) :]: value for name, value in self.kept.items() if name.startswith(start)}
        points_TE, radii_TE = self.kept["points"][self.picked], self.kept["radii"][self.picked]
        box = Interval.of(points_TE - radii_TE, points_TE + radii_TE)
        low_TN, up_TN = ends(functional_call(net.generator, own, (box, [self.old[k] for k in self.picked])))
        return low_TN.unbind(), up_TN.unbind()

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        is_bounded = state.has_begun and self.kappa_at(state) < 1
        rows = batch_size if is_bounded else 0
        return Cost(rows, rows) + super().cost(state, batch_size)
