"""What strategies with a hypernetwork have in common: wrapping, targets of old conditions, and what holds them.

    penalty = beta * mean over old conditions j of |theta*_j - theta_j(phi + delta)|^2

phi are the generator's parameters, delta the change that the optimizer would make without the penalty (look-ahead), and
theta*_j the weights generated for j when the experience began. Embeddings of old conditions are not trained.

At the end of each experience the compression ratio is noted in `Result.extra`: learnt numbers over those of one
generated network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Output, Stream, StreamInfo, UserError
from cl.hooks import Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require_choice, require_count, require_number
from strategies._hypernet import Hypernetwork
from strategies._hypernet_conditions import condition_of, conditions, other_heads
from strategies._hypernet_distances import Distances
from strategies._hypernet_layout import Ranges
from strategies._importance import mean_over_rows
from strategies._lookahead import require_planned, stepped
from strategies._quadratic import Vectors, copied
from strategies.generative_replay import GenerativeReplay

TARGETS = ("weights", "generator")


class Generating(Strategy):
    """Train a generator of weights in place of weights, and hold what it says for old conditions.

    Args:
        embedding: width of the embedding of a condition.
        beta: strength of the penalty; 0 keeps no targets.
        lookahead: penalise the generator as it will be after the step.
        penalty_conditions: old conditions that the penalty looks at in a step, drawn anew each time; None takes all.
        targets: keep the generated "weights" of old conditions, or one copy of the "generator" that generates them.
        importance_rows: rows of each experience that the Fisher information of the generated weights is measured on;
            it weights the squares, at a mean of 1. None weights all the same.
        heads: generate "one" head for each condition, or "every" head of the backbone each time, as published; the
            penalty then leaves out the heads of other conditions.
        start: "backbone" scales generated weights to those that the backbone was drawn with; "xavier" takes what a
            generator with Xavier weights says, as published.
        embedding_lr: learning rate of embeddings; None takes that of the run.

    Raises:
        UserError: a value outside its range; made rows (`generative_replay`), or experiences joined before it, where
            rows have no task label; or a second hypernetwork.
    """

    def __init__(
        self,
        embedding: int,
        beta: float,
        lookahead: bool,
        penalty_conditions: int | None,
        targets: str,
        importance_rows: int | None,
        heads: str,
        start: str,
        embedding_lr: float | None,
    ) -> None:
        require_count(f"{self.name}.embedding", embedding)
        require_number(f"{self.name}.beta", beta)
        require_count(f"{self.name}.penalty_conditions", penalty_conditions, none_means="all old conditions")
        require_choice(f"{self.name}.targets", targets, TARGETS)
        require_count(f"{self.name}.importance_rows", importance_rows, none_means="no importance")
        require_choice(f"{self.name}.heads", heads, ("one", "every"))
        require_choice(f"{self.name}.start", start, ("backbone", "xavier"))
        if embedding_lr is not None:
            require_number(f"{self.name}.embedding_lr", embedding_lr)
        self.embedding, self.beta, self.lookahead = embedding, beta, lookahead
        self.penalty_conditions, self.targets, self.importance_rows = penalty_conditions, targets, importance_rows
        self.heads, self.start, self.embedding_lr = heads, start, embedding_lr
        self.table: list[int] = []
        self.num_conditions = 0
        self.has_tasks = False
        self.old: list[int] = []
        """Conditions seen before the running experience, without its own."""
        self.picked: list[int] = []
        """Those that the penalty looks at in this step, by their place in `old`."""
        self.kept: Vectors = {}
        """Targets: "numbers" (T, N); or the generator's tensors by name, and the "points" (T, E) it was given."""
        self.importance: Vectors = {}
        """Condition as a string -> (N,)."""
        self.others: dict[int, Ranges] = {}
        self.distances: Distances | None = None

    def check(self, stream: Stream) -> None:
        self.has_tasks = stream.info.num_heads > 1

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        for other in strategies:
            if isinstance(other, Generating) and other is not self:
                raise UserError(f"{self.name} and {other.name} both generate the network's weights; leave one out")
            if isinstance(other, GenerativeReplay) and not self.has_tasks:
                raise UserError(
                    f"{self.name} answers each row by the weights of its experience, and the rows of {other.name} have "
                    "none; they go together where rows have a task label, in the task_incremental setting"
                )

    # the network and its optimizer

    def make_generator(self, num_numbers: int) -> nn.Module:
        """Embeddings (T, E), conditions -> (T, N); with a linear `last` layer."""
        raise NotImplementedError

    def plan(self, stream: Stream) -> Stream:
        """Nothing changes; conditions are counted."""
        # rows keep the experience that they come from, and one that holds those of later ones stands for all
        if stream.info.num_heads == 1 and any(each.merged > each.id + 1 for each in stream.experiences):
            raise UserError(
                f"{self.name} keeps an embedding for each experience, and they are joined before it can count them; "
                f"name it first, as in strategy=[{self.name},joint]"
            )
        self.table, self.num_conditions = conditions(stream)
        return stream

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        return Hypernetwork(
            backbone,
            info,
            self.table,
            self.num_conditions,
            self.embedding,
            self.make_generator,
            one_head=self.heads == "one",
            keeps_scale=self.start == "backbone",
        )

    def make_optimizer(self, module: nn.Module, default: Callable[[Iterable[Any]], Optimizer]) -> Optimizer:
        """Two groups, which an optimizer that works on each number alone treats as two optimizers."""
        embeddings = list(self.net(module).embeddings.parameters())
        is_embedding = {id(e) for e in embeddings}
        others = [p for p in module.parameters() if id(p) not in is_embedding and p.requires_grad]
        rate = {} if self.embedding_lr is None else {"lr": self.embedding_lr}
        return default([{"params": others}, {"params": embeddings, **rate}])

    def net(self, model: nn.Module) -> Hypernetwork:
        return next(m for m in model.modules() if isinstance(m, Hypernetwork))

    def on_run_start(self, state: TrainState) -> None:
        if self.lookahead and self.beta > 0:
            require_planned(state.optimizer, f"{self.name}.lookahead")

    # one experience

    def on_experience_start(self, state: TrainState) -> None:
        net, current = self.net(state.model), self.condition(state)
        self.old = [c for c in net.seen_conditions() if c != current]
        self.picked, self.kept = list(range(len(self.old))), {}
        if self.beta > 0 and self.old:
            self.kept = self.take(net)

    def condition(self, state: TrainState) -> int:
        """Of the running experience."""
        return condition_of(state, self.table)

    @torch.no_grad()
    def take(self, net: Hypernetwork) -> Vectors:
        """Targets of the old conditions, as the generator is now."""
        if self.targets == "weights":
            return {"numbers": net.generated(self.old)}
        own = {f"generator.{name}": value for name, value in net.generator.state_dict().items()}
        return copied(own) | {"points": net.points(self.old)}

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self.net(state.model).mark(batch)
        size = self.penalty_conditions
        if state.micro_step == 0 and size is not None and self.beta > 0 and size < len(self.old):
            self.picked = draw_without_replacement(len(self.old), size, state.seeds.named(self.name)).tolist()
        return batch

    # what holds old conditions

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        """Without look-ahead the penalty is a term of the loss like any other."""
        if self.lookahead or not self.kept:
            return None
        return self.pull(self.net(state.model))

    def on_gradients(self, state: TrainState) -> None:
        """With look-ahead it needs the gradients of everything else first, and adds its own to them."""
        if not self.lookahead or not self.kept:
            return
        net = self.net(state.model)
        named = dict(net.generator.named_parameters())
        parameters = list(named.values())
        ahead = [p.requires_grad_() for p in stepped(state.optimizer, parameters)]
        pull = self.pull(net, dict(zip(named, ahead, strict=True)))
        found = torch.autograd.grad(pull, ahead, allow_unused=True)
        for p, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def pull(self, net: Hypernetwork, parameters: Vectors | None = None) -> Tensor:
        """The penalty for the generator as it is, or with other parameters."""
        conditions = [self.old[k] for k in self.picked]
        given = (net.points(conditions).detach(), conditions, partial(self._finish, net, self.wanted(net)))
        apart_T: Tensor = functional_call(net.generator, parameters or {}, given)
        return self.beta * apart_T.mean()

    def _finish(
        self,
        net: Hypernetwork,
        wanted_TN: Sequence[Tensor],
        units_TKH: Tensor,
        weight_MH: Tensor,
        bias_M: Tensor,
        num_numbers: int,
    ) -> Tensor:
        """In the place of the numbers that a generator returns, their distances."""
        if self.distances is None or self.distances.layout is not net.layout:
            self.distances = Distances(net.layout)
        return self.distances(units_TKH, weight_MH, bias_M, wanted_TN, *self._counted(net))

    @torch.no_grad()
    def wanted(self, net: Hypernetwork) -> Sequence[Tensor]:
        """(N,) targets of each of the conditions picked."""
        if self.targets == "weights":
            return [self.kept["numbers"][k] for k in self.picked]
        start = "generator."
        own = {name[len(start) :]: value for name, value in self.kept.items() if name.startswith(start)}
        conditions = [self.old[k] for k in self.picked]
        generated_TN: Tensor = functional_call(net.generator, own, (self.kept["points"][self.picked], conditions))
        return generated_TN.unbind()

    def apart(self, net: Hypernetwork, numbers_TN: Tensor, wanted_TN: Sequence[Tensor]) -> Tensor:
        """Mean over the conditions picked of the squared distance of their weights, as far as it counts."""
        return net.layout.distances(numbers_TN, wanted_TN, *self._counted(net)).mean()

    def _counted(self, net: Hypernetwork) -> tuple[Tensor | None, Sequence[Ranges]]:
        """For each of the conditions picked, what its numbers matter, and which do not count."""
        conditions = [self.old[k] for k in self.picked]
        importance_TN = torch.stack([self.importance[str(c)] for c in conditions]) if self.importance else None
        return importance_TN, [self.skipped(net, c) for c in conditions] if self.heads == "every" else ()

    def skipped(self, net: Hypernetwork, condition: int) -> Ranges:
        """The heads of other conditions."""
        if condition not in self.others:
            self.others[condition] = other_heads(net, condition)
        return self.others[condition]

    def on_experience_end(self, state: TrainState) -> None:
        """Measure what the weights of this condition matter."""
        net, current = self.net(state.model), self.condition(state)
        state.note(f"{self.name}_compression", net.compression)
        if self.importance_rows is None or self.beta == 0 or current < 0:
            return
        plain = replace(state, model=net.materialised(current).to(state.device))
        index = draw_without_replacement(
            len(state.data), min(self.importance_rows, len(state.data)), state.seeds.named(self.name)
        )
        fisher_N = net.layout.flat(mean_over_rows(plain, index, F.cross_entropy, torch.square))
        self.importance[str(current)] = fisher_N / fisher_N.mean().clamp(min=torch.finfo(fisher_N.dtype).tiny)

    # cost and state

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        nets = [m for m in state.model.modules() if isinstance(m, Hypernetwork)]
        past = [net.embeddings[c] for net in nets for c in self.old]
        return Cost(buffer_bytes=tensor_bytes(self.state_dict(), past))

    def state_dict(self) -> dict[str, Any]:
        return {"old": list(self.old), "picked": list(self.picked), "kept": self.kept, "importance": self.importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old, self.picked = list(state["old"]), list(state["picked"])
        self.kept, self.importance = copied(state["kept"]), copied(state["importance"])
