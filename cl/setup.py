"""From what a run is made of to the state it starts in: check, plan, build, wrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from cl.config import PRECISIONS, TrainerConfig
from cl.core import Setting, Stream, StreamInfo, UserError
from cl.hooks import Strategy, check_all
from cl.loader import steps_in
from cl.seeding import Seeds
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
    for strategy in strategies:
        stream = strategy.plan(stream)
    device, seeds = config.torch_device(), Seeds(seed)
    with seeds.as_global("init"):
        model = backbone(stream.info)
        for strategy in strategies:
            model = strategy.wrap(model, stream.info)
    model.to(device)
    dtype = PRECISIONS[config.precision]
    autocast = nullcontext if dtype is None else partial(torch.autocast, device.type, dtype)
    state = TrainState(model, make_optimizer(model), stream, seeds, device, autocast, masks_absent=masks_absent)
    state.total_steps = sum(experience_steps(stream, config))
    return state


def experience_steps(stream: Stream, config: TrainerConfig) -> list[int]:
    """Optimizer steps of each experience."""
    return [steps_in(each, config.budget, stream.info) for each in stream.experiences]
