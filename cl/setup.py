"""From what a run is made of to the state it starts in: check, plan, build, wrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import nn
from torch.optim import Optimizer

from cl.config import PRECISIONS, TrainerConfig
from cl.core import Setting, Stream, StreamInfo, UserError
from cl.distributed import World
from cl.hooks import Strategy, check_all, overrides
from cl.loader import require_rows, steps_in
from cl.scaling import LossScaler
from cl.seeding import Seeds
from cl.shards import shard
from cl.state import TrainState


def prepare(
    stream: Stream,
    backbone: Callable[[StreamInfo], nn.Module],
    strategies: Sequence[Strategy],
    make_optimizer: Callable[[nn.Module], Optimizer],
    config: TrainerConfig,
    seed: int,
) -> TrainState:
    """The state before the first step, with a network drawn under the run's own seed.

    Raises:
        UserError: a strategy or the batch size cannot work on this stream, or the device cannot be used.
    """
    check_all(strategies, stream)
    if stream.check_batch is not None:
        stream.check_batch(config.batch_size)
    masks_absent = config.logit_mask == "batch"
    if masks_absent and stream.info.setting == Setting.CONTINUAL_PRETRAINING:
        raise UserError("trainer.logit_mask is 'batch', which needs rows with one class each; text must take 'none'")
    stream = planned(stream, strategies, config)
    for experience in stream.experiences:
        require_rows(experience, experience.num_samples)
    device, seeds = config.torch_device(), Seeds(seed)
    with seeds.as_global("init"):
        model = backbone(stream.info)
        for strategy in strategies:
            model = strategy.wrap(model, stream.info)
        for strategy in strategies:
            strategy.check_model(model, stream.info)
    model.to(device)
    world = World.of(config.parallel)
    check_world(world, strategies, model, masks_absent, stream.info.num_heads)
    if world.kind == "fsdp":
        shard(model, world.size)
    if config.compile:
        model.compile()
    dtype = PRECISIONS[config.precision]
    autocast = nullcontext if dtype is None else partial(torch.autocast, device.type, dtype)
    optimizer, network = make_optimizer(model), world.network(model, stream.info.num_heads)
    state = TrainState(model, optimizer, stream, seeds, device, autocast, masks_absent=masks_absent)
    state.world, state.network = world, network
    is_scaled = torch.float16 in (dtype, *(p.dtype for p in model.parameters()))
    state.scaler = LossScaler(device.type, enabled=is_scaled)
    state.experience_steps = experience_steps(stream, config)
    state.total_steps = sum(state.experience_steps)
    return state


def check_world(
    world: World, strategies: Sequence[Strategy], model: nn.Module, masks_absent: bool, num_heads: int
) -> None:
    """Whether a run computes in several processes what it computes in one.

    Raises:
        UserError: a strategy that does not declare it, or what looks at the whole batch at once.
    """
    if world.size == 1:
        return
    asked = f"trainer.parallel={world.kind}"
    for strategy in strategies:
        if world.kind not in strategy.parallel:
            known = ", ".join(sorted(strategy.parallel)) or "none"
            raise UserError(f"strategy {strategy.name} does not run under {asked}; of the wrappers it declares {known}")
        if num_heads > 1 and overrides(strategy, "penalty"):
            raise UserError(f"strategy {strategy.name} has a penalty, which {asked} allows with one head only")
    if world.kind == "fsdp" and num_heads > 1:
        raise UserError(
            "trainer.parallel=fsdp needs every process to use every weight at every step, and each task has a head of "
            "its own; take ddp"
        )
    if masks_absent:
        raise UserError(f"trainer.logit_mask is 'batch', which needs the whole batch in one process, not {asked}")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{name} of the backbone normalises over the batch, of which {asked} shows each process a part; choose "
                "a backbone without batch norm"
            )
        if getattr(module, "commits", False):
            raise UserError(f"the backbone's memory outlives a batch and would differ between processes under {asked}")


def planned(stream: Stream, strategies: Sequence[Strategy], config: TrainerConfig) -> Stream:
    """The stream as the strategies plan it, as far as the budget goes.

    Raises:
        UserError: a list of steps that is longer than the stream.
    """
    for strategy in strategies:
        stream = strategy.plan(stream)
    if not isinstance(config.max_steps, list | tuple):
        return stream
    count, known = len(config.max_steps), len(stream.experiences)
    if count > known:
        raise UserError(
            f"trainer.max_steps lists the steps of {count} experiences, and stream {stream.info.name} has {known}"
        )
    return replace(stream, experiences=stream.experiences[:count])


class Span:
    """Where a step of the run lies on the course of the schedule.

    Args:
        steps: trained in each experience.

    Raises:
        UserError: `trainer.schedule_steps` or `trainer.schedule_start` does not fit them.

    Example:
        >>> Span([10, 30], TrainerConfig(schedule_start=15)).at(experience=1, step=10)
        (5, 25)
        >>> longer = Span([20, 40], TrainerConfig(schedule_steps=[10, 30]))
        >>> longer.at(experience=0, step=15), longer.at(experience=1, step=0), longer.at(experience=1, step=35)
        ((9, 40), (10, 40), (45, 40))
    """

    def __init__(self, steps: Sequence[int], config: TrainerConfig) -> None:
        listed = steps if config.schedule_steps is None else config.schedule_steps
        is_list = isinstance(listed, list | tuple) and len(listed) == len(steps)
        if not is_list or not all(type(count) is int and count >= 1 for count in listed):
            raise UserError(
                f"trainer.schedule_steps is {config.schedule_steps!r}; it must be a list of {len(steps)} integers of "
                "at least 1, the steps of each experience"
            )
        self.is_run, self.start = config.schedule_span == "run", config.schedule_start
        # where each experience begins on the plan, and in the run
        self.skipped = [
            max(0, min(count, self.start - begin))
            for begin, count in zip(accumulate(steps, initial=0), listed, strict=False)
        ]
        self.lengths = [count - skipped for count, skipped in zip(listed, self.skipped, strict=True)]
        self.total = sum(self.lengths)
        if not self.total:
            raise UserError(
                f"trainer.schedule_start is {self.start}; it must be below the {sum(listed)} steps of the schedule"
            )

    @property
    def steps(self) -> list[int]:
        """Steps on the schedule of the experiences that it covers."""
        return [length for length in self.lengths if length]

    def at(self, experience: int, step: int) -> tuple[int, int]:
        """(step, total) for the schedule, of a step within an experience.

        In a longer experience than planned it waits at the last planned step until the next one begins.
        """
        local, length = max(0, step - self.skipped[experience]), self.lengths[experience]
        if not self.is_run:
            return local, max(1, length)
        if experience < len(self.lengths) - 1:
            local = min(local, max(0, length - 1))
        return sum(self.lengths[:experience]) + local, self.total


def experience_steps(stream: Stream, config: TrainerConfig) -> list[int]:
    """Optimizer steps of each experience."""
    return [steps_in(each, config.budget, stream.info) for each in stream.experiences]
