"""Train on a toy stream while looking on: losses, weights, work counted independently, traces left behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl.buffers.base import Buffer
from cl.config import TrainerConfig
from cl.core import Batch, Setting, Stream
from cl.hooks import Strategy
from cl.observe import Observer
from cl.result import Result
from cl.state import Cost, TrainState
from cl.testing.toy import Tally, ToyNet, toy_stream
from cl.trainer import Trainer

BATCH_SIZE = 16
"""Divides the toy stream's rows, so that every step has as many."""
RECIPE: Mapping[str, Any] = {"epochs": 3, "batch_size": BATCH_SIZE, "device": "cpu"}
LEARNING_RATE = 0.2


@dataclass
class Record:
    """What one toy run left.

    Args:
        losses: total loss of each step, in order; the first one is that of step `first_step`.
        declared, counted: extra rows of each step: what `cost` said before it, and what the network saw.
        drew: the run drew from torch's, numpy's or Python's global random state.
        before, after: `traces` of the model.
        largest: most rows that each buffer ever held.
    """

    trainer: Trainer
    result: Result
    weights: dict[str, Tensor]
    losses: list[float]
    first_step: int
    after_first_step: dict[str, Tensor]
    declared: list[Cost]
    counted: list[Cost]
    tally: Tally
    drew: bool
    before: dict[str, Any]
    after: dict[str, Any]
    largest: dict[int, int] = field(default_factory=dict)


def train(
    setting: Setting | Stream,
    strategies: Sequence[Strategy],
    *,
    backbone: Callable[..., nn.Module] = ToyNet,
    seed: int = 0,
    run_dir: Path | None = None,
    stop_at: int | None = None,
    resume: bool = False,
    **config: Any,
) -> Record:
    """Train a toy network on a toy stream under a `Probe`.

    Args:
        setting: of the toy stream, or a stream.
        stop_at: ask the run to stop after the step of this number.
        config: arguments of `TrainerConfig` in place of those of `RECIPE`.
    """
    stream = setting if isinstance(setting, Stream) else toy_stream(setting)
    probe, watch = Probe(strategies), _Watch(stop_at)
    trainer = Trainer(
        stream,
        backbone,
        [probe, *strategies],
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
        config=TrainerConfig(**(dict(RECIPE) | config)),
        seed=seed,
        run_dir=run_dir,
        observers=[watch],
    )
    watch.trainer = trainer
    probe.tally = next((m.tally for m in trainer.state.model.modules() if isinstance(m, ToyNet)), Tally())
    before, globals_before = traces(trainer.state.model), _other_generators()
    result = trainer.run(resume=resume)
    return Record(
        trainer,
        result,
        weights_of(trainer.state.model),
        watch.losses,
        watch.first_step,
        probe.after_first_step,
        probe.declared,
        probe.counted,
        probe.tally,
        watch.drew or globals_before != _other_generators(),
        before,
        traces(trainer.state.model),
        probe.largest,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model's `state_dict`."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(left: Any, right: Any) -> bool:
    """Whether nested dicts, lists, tuples, tensors and numbers agree bit for bit, NaN included."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and _same_bits(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.is_floating_point():
        return torch.equal(left.nan_to_num(nan=-1.25e30), right.nan_to_num(nan=-1.25e30))
    return torch.equal(left, right)


def traces(model: nn.Module) -> dict[str, Any]:
    """Mode and hooks of every module, `requires_grad` and hooks of every parameter."""
    module_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"module {name!r}"] = (module.training, [len(getattr(module, hooks)) for hooks in module_hooks])
    for name, p in model.named_parameters():
        hooks = [len(getattr(p, h) or ()) for h in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        found[f"parameter {name!r}"] = (p.requires_grad, hooks)
    return found


def buffers_of(strategy: Strategy) -> list[Buffer]:
    """Every `Buffer` among a strategy's attributes, in dicts and lists too."""

    def search(value: Any) -> list[Buffer]:
        if isinstance(value, Buffer):
            return [value]
        inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
        return [found for item in inner for found in search(item)]

    return search(vars(strategy))


def _other_generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


class Probe(Strategy):
    """Goes first in the list and changes nothing.

    First means outermost: its `step` sees the final gradients before any inner update, its `on_batch` opens a step
    before the others act and its `on_experience_end` closes the last one.
    """

    settings = frozenset(Setting)

    def __init__(self, watched: Sequence[Strategy]) -> None:
        self.watched = list(watched)
        self.tally = Tally()
        self.declared: list[Cost] = []
        self.counted: list[Cost] = []
        self.after_first_step: dict[str, Tensor] = {}
        self.largest: dict[int, int] = {}
        self._opened: Cost | None = None

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if state.micro_step == 0:
            self._close()
            self._opened = Cost(self.tally.forwards, self.tally.backwards)
            costs = [strategy.cost(state, BATCH_SIZE) for strategy in self.watched]
            self.declared.append(sum(costs, start=Cost()))
        # the stream's own rows are plain training: whoever counts extra rows starts after them
        self._opened = self._opened and self._opened + Cost(len(batch), len(batch))
        return batch

    def on_experience_end(self, state: TrainState) -> None:
        self._close()

    def _close(self) -> None:
        if self._opened is not None:
            now, then = self.tally, self._opened
            self.counted.append(Cost(now.forwards - then.forwards, now.backwards - then.backwards))
        self._opened = None

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        for name, p in state.parameters().items():
            assert p.grad is None or p.grad.isfinite().all(), f"gradient of {name} at step {state.step} is not finite"
        update()
        if state.step == 0:
            self.after_first_step = weights_of(state.model)
        for i, buffer in enumerate(b for strategy in self.watched for b in buffers_of(strategy)):
            self.largest[i] = max(self.largest.get(i, 0), len(buffer))


class _Watch(Observer):
    """Collects losses and random state as an observer, since both are visible to the loop only."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.trainer: Trainer | None = None
        self.losses: list[float] = []
        self.first_step = -1
        self.drew = False
        self._random_state = torch.get_rng_state()

    def on_start(self, result: Result, settings: Mapping[str, Any]) -> None:
        self._random_state = torch.get_rng_state()

    def on_step(self, state: TrainState, losses: Mapping[str, float], lr: float) -> None:
        if not self.losses:
            self.first_step = state.step
        self.losses.append(losses["loss"])
        if state.step == self.stop_at and self.trainer is not None:
            self.trainer.request_stop()

    def on_end(self, result: Result) -> None:
        self.drew = not torch.equal(self._random_state, torch.get_rng_state())
