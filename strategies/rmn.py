"""Relevance mapping networks: tasks share one set of weights, and each has a map of those that are relevant to it.

    W_k = W * M_k;   loss = CE + sparsity * mean(sigmoid(sharpness * A))       A: scores of the map that is learnt
    at the end of a task:  M_k = 1 where A > 0;  weights that any finished map needs do not move again

so that what a finished task answers under its map never changes; its head, where it has one, is trained under that map
only, also when another strategy replays its rows. Without task labels, a row is answered by the map that is most
confident (least entropy). With `boundaries=detected` nobody is told when a task begins: a batch whose mean differs from
that of the running task by more than `jump` times what chance explains belongs to another task, to an earlier one whose
mean fits, or to a new one. Of a step in several micro-batches the first one decides.

    jump = |mean of batch - mean of task|^2 / (total variance * (1 / rows of batch + 1 / rows of task))

Source: Kaushik, Gain, Kortylewski & Yuille, "Understanding Catastrophic Forgetting and Remembering in Continual
Learning with Optimal Relevance Mapping", 2021. No code was found and little of the method is known here, so these are
choices of ours: maps are binary from the start, with the gradient of a sharp sigmoid; they begin as random shares of
the weights; scores have a learning rate of their own; tasks are told apart by the means of their inputs.

Shape legend: B rows, K maps, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.core import Batch, Output, StreamInfo, UserError
from cl.hooks import Contract, Strategy, overrides
from cl.state import Cost, TrainState, tensor_bytes
from strategies._at_rest import AtRest, clear_gradients, step_beside
from strategies._checks import require, require_at_rest, require_choice, require_count, require_number
from strategies._relevance import RelevanceNet

BOUNDARIES = ("given", "detected")
UNRESOLVED = 1e-12
"""Variance, as a share of the mean square, that sums in double precision may not tell from 0."""


class Rmn(Strategy):
    """Learn which weights each task needs, and keep them.

    Args:
        density: share of the weights in a new map.
        sparsity: pull of scores towards irrelevance, so that later tasks find free weights.
        sharpness: paper's s, of the sigmoid whose gradient the scores get.
        map_lr: learning rate of the scores, as a multiple of the weights'.
        boundaries: "given", each domain is a task; or "detected" from the inputs.
        jump: at which a batch belongs to another task.
        max_maps: maps at most; None takes the number of experiences. When none is left, the last one is learnt on,
            and what it answered before changes.

    Raises:
        UserError: a value outside its range, a layer that is neither linear nor convolutional, or a strategy beside it
            that moves weights outside of the loop's steps or wraps the network that it has masked.

    Cost: no rows in training; prediction without task labels takes one pass for each map. One byte per weight and map,
    for all `max_maps` from the start.
    """

    contract = Contract(
        toy={"density": 0.5},
        why_not_zero="its network is masked, whatever the arguments are",
        forgets_less_by=0.1,
    )

    def __init__(
        self,
        density: float = 0.3,
        sparsity: float = 0.0,
        sharpness: float = 10.0,
        map_lr: float = 10.0,
        boundaries: str = "given",
        jump: float = 4.0,
        max_maps: int | None = None,
    ) -> None:
        require_number("rmn.density", density, above=0.0)
        require(density <= 1, "rmn.density", density, "at most 1")
        for name, value in (("sparsity", sparsity), ("map_lr", map_lr)):
            require_number(f"rmn.{name}", value)
        for name, value in (("sharpness", sharpness), ("jump", jump)):
            require_number(f"rmn.{name}", value, above=0.0)
        require_choice("rmn.boundaries", boundaries, BOUNDARIES)
        require_count("rmn.max_maps", max_maps, none_means="the number of experiences")
        self.density, self.sparsity, self.sharpness, self.map_lr = density, sparsity, sharpness, map_lr
        self.boundaries, self.jump, self.max_maps = boundaries, jump, max_maps
        self.num_maps, self.active, self.is_open = 0, 0, False
        self.tasks: dict[str, int] = {}
        """Map of each domain (given), and of each head."""
        self.moments: list[dict[str, Tensor]] = []
        """Of each map, `count`, `sum` and `squares` of the inputs it was learnt on (detected)."""

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        require_at_rest(self, strategies)
        behind = strategies[list(strategies).index(self) + 1 :]
        for other in behind:
            if overrides(other, "wrap"):
                raise UserError(
                    f"{self.name} masks the network, and {other.name} behind it puts something around it that has no "
                    "map; leave one of the two out"
                )

    # around the network

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        return RelevanceNet(backbone, self.max_maps or info.num_experiences, self.sharpness, self.name)

    def make_optimizer(self, module: nn.Module, default: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Optimizer:
        """Scores are a group of their own: another rate, no weight decay."""
        scores = list(_net(module).scores)
        of_scores = {id(score) for score in scores}
        others = [p for p in module.parameters() if id(p) not in of_scores]
        optimizer = default([{"params": others}, {"params": scores}])  # type: ignore[list-item]
        optimizer.param_groups[1]["lr"] *= self.map_lr
        if "weight_decay" in optimizer.param_groups[1]:
            optimizer.param_groups[1]["weight_decay"] = 0.0
        return optimizer

    def on_resume(self, state: TrainState) -> None:
        net = _net(state.model)
        net.active, net.is_open = self.active, self.is_open
        self.moments = [{name: each.to(state.device) for name, each in kept.items()} for kept in self.moments]

    # which map

    def on_experience_start(self, state: TrainState) -> None:
        experience = state.experience
        if self.boundaries == "given":
            self._enter(state, self.tasks.get(experience.domain))
            self.tasks[experience.domain] = self.active
            if experience.task_id is not None:
                self.tasks[f"head {experience.task_id}"] = self.active
        elif self.num_maps == 0:
            self._enter(state, None)

    def _enter(self, state: TrainState, known: int | None) -> None:
        """Use a known map, or begin a new one; the one in use is finished."""
        net = _net(state.model)
        if self.is_open:
            net.finish()
        most = len(net.maps(0))
        if known is None and self.num_maps == most:
            known, net.is_open = most - 1, True
            for number in range(len(net.names)):
                # it is still the map that the scores say
                net.maps(number)[known] = False
        if known is None:
            known, self.num_maps = self.num_maps, self.num_maps + 1
            net.redraw(self.density, state.seeds.fresh(self.name, "map", known))
            for score in net.scores:
                state.optimizer.state.pop(score, None)
            self.moments.append({})
        self.active = net.active = known
        self.is_open = net.is_open

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if self.boundaries == "detected":
            self._look(state, batch.current())
        return batch

    def _look(self, state: TrainState, rows: Batch) -> None:
        """Whose inputs these are."""
        inputs = rows.inputs.flatten(1).double()
        if state.micro_step == 0 and _jump(inputs, self.moments[self.active]) > self.jump:
            fits = [_jump(inputs, kept) for kept in self.moments]
            best, before = min(range(len(fits)), key=fits.__getitem__), self.active
            # a map of one row waits for more before another one begins
            if fits[best] <= self.jump or self.moments[before].get("count", 0) > 1:
                self._enter(state, best if fits[best] <= self.jump else None)
            # with no map left it may be the same one
            if self.active != before:
                state.note("rmn_map", self.active)
        if rows.task_id is not None:
            self.tasks.update({f"head {head}": self.active for head in rows.task_id.unique().tolist()})
        _add(self.moments[self.active], inputs)

    # one step

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if self.sparsity == 0 or not self.is_open:
            return None
        scores = torch.cat([score.flatten() for score in _net(state.model).scores])
        return self.sparsity * torch.sigmoid(self.sharpness * scores).mean()

    def on_gradients(self, state: TrainState) -> None:
        clear_gradients(self._held(state))

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        step_beside(self._held(state), update)

    def _held(self, state: TrainState) -> AtRest:
        """Weights that a finished map needs, and heads of tasks that another map answers."""
        net = _net(state.model)
        heads = [
            (p, torch.ones((), dtype=torch.bool, device=p.device))
            for task, p in net.heads()
            if self.tasks.get(f"head {task}", self.active) != self.active
        ]
        return [*zip(net.weights(), net.frozen(), strict=True), *heads]

    def on_experience_end(self, state: TrainState) -> None:
        net = _net(state.model)
        if self.boundaries == "given" and self.is_open:
            net.finish()
            self.is_open = False
        used = sum(int(frozen.sum()) for frozen in net.frozen())
        state.note("rmn_used", used / sum(weight.numel() for weight in net.weights()))

    @property
    def seals(self) -> str:
        return "froze the map" if self.boundaries == "given" else ""

    # prediction

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        if self.num_maps == 0:
            return None
        with state.autocast():
            if batch.task_id is not None:
                return self._by_task(state, batch)
            every = [_net(state.model)(batch, which=k) for k in range(self.num_maps)]
        logits_KBC = torch.stack([output.logits for output in every]).float()
        log_p_KBC = logits_KBC.log_softmax(-1)
        entropy_KB = -(log_p_KBC.exp() * log_p_KBC).sum(-1)
        best_B = entropy_KB.argmin(0)
        return Output(logits_KBC[best_B, torch.arange(len(batch), device=best_B.device)])

    def _by_task(self, state: TrainState, batch: Batch) -> Output:
        """Rows of each task under its map; of a task that was never trained, under the one in use."""
        rows, logits = [], []
        for head in batch.heads.unique().tolist():
            rows.append((batch.heads == head).nonzero().squeeze(1))
            which = self.tasks.get(f"head {head}", self.active)
            logits.append(_net(state.model)(batch[rows[-1]], which=which).logits)
        return Output(torch.cat(logits)[torch.cat(rows).argsort()])

    # what it keeps

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        nets = [module for module in state.model.modules() if isinstance(module, RelevanceNet)]
        maps = [net.maps(number) for net in nets for number in range(len(net.names))]
        return Cost(buffer_bytes=tensor_bytes(maps, self.moments))

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": [self.num_maps, self.active, int(self.is_open)],
            "tasks": dict(self.tasks),
            "moments": [dict(kept) for kept in self.moments],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_maps, self.active, is_open = state["position"]
        self.is_open = bool(is_open)
        self.tasks = dict(state["tasks"])
        self.moments = [{name: value.clone() for name, value in kept.items()} for kept in state["moments"]]


def _net(model: nn.Module) -> RelevanceNet:
    for module in model.modules():
        if isinstance(module, RelevanceNet):
            return module
    raise UserError("rmn finds no relevance maps in the model; another strategy has taken them out")


def _jump(inputs: Tensor, kept: dict[str, Tensor]) -> float:
    """How far the mean of some rows is from that of others, in units of what chance explains; about 1 if they agree.

    Infinity beside less than two rows, which say nothing of chance. Rows that are all the same leave nothing to chance:
    0 for the same ones again, and more than any bound for others.
    """
    count = kept.get("count", 0)
    if count < 2:
        return float("inf")
    mean = kept["sum"] / count
    # summed over inputs before the ratio is taken: pixels that are hardly ever lit say nothing of a batch
    squares = kept["squares"] / count
    # what the difference of two sums cannot resolve is neither negative nor a ratio of nothing to nothing
    least = (UNRESOLVED * squares.sum()).clamp(min=torch.finfo(squares.dtype).tiny)
    variance = torch.maximum((squares - mean.square()).sum(), least) * count / (count - 1)
    return float((inputs.mean(0) - mean).square().sum() / (variance * (1 / len(inputs) + 1 / count)))


def _add(kept: dict[str, Tensor], inputs: Tensor) -> None:
    found = {"count": inputs.new_tensor(len(inputs)), "sum": inputs.sum(0), "squares": inputs.square().sum(0)}
    for name, value in found.items():
        kept[name] = kept[name] + value if name in kept else value
