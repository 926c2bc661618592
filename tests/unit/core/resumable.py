"""A run that uses everything a checkpoint must hold, and dies on command. Loaded by path by test_resume."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cl.config import TrainerConfig
from cl.core import Setting
from cl.observe import Observer
from cl.schedules import cosine
from cl.testing import ToyNet, toy_stream
from cl.testing.companion import Companion
from cl.trainer import Trainer
from strategies.replay import Replay


class Dropped(ToyNet):
    """Dropout draws from the global generator, batch norm keeps running statistics: both are state of a run."""

    def __init__(self, info):
        super().__init__(info)
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.3)

    def features(self, inputs):
        return self.drop(self.norm(super().features(inputs)))


def jitter(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def trainer_of(run_dir, observers=(), fingerprint="one", **config):
    stream = replace(toy_stream(Setting.CLASS_INCREMENTAL), augment=jitter)
    return Trainer(
        stream,
        Dropped,
        [Replay(capacity=40), Companion()],
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule=cosine,
        config=TrainerConfig(
            **(
                {
                    "epochs": 2,
                    "batch_size": 16,
                    "accumulation": 2,
                    "clip_norm": 1.0,
                    "eval_every": 5,
                    "checkpoint_every": 4,
                    "reset_optimizer": True,
                    "device": "cpu",
                }
                | config
            )
        ),
        run_dir=run_dir,
        observers=observers,
        fingerprint=fingerprint,
    )


class Kill(Observer):
    """Ends the process the hard way when a step is reached."""

    def __init__(self, at):
        self.at = at

    def on_step(self, state, losses, lr):
        if state.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(nth):
    """Let the nth checkpoint be half written when the process dies."""
    whole, written = torch.save, 0

    def half(content, file):
        nonlocal written
        written += 1
        whole(content, file)
        if written == nth:
            file.flush()
            os.truncate(file.fileno(), 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def kill_at(folder, *steps):
    """For every step a child process trains in a folder of that name and kills itself with SIGKILL.

    At that step, or, for a step like "w3", in the middle of writing its third checkpoint.
    """
    # the first optimizer imports for a second, which the children need not repeat
    trainer_of(None)
    for step in steps:
        child = os.fork()
        if child == 0:
            try:
                if step.startswith("w"):
                    kill_while_writing(int(step[1:]))
                trainer_of(Path(folder) / step, [Kill(-1 if step.startswith("w") else int(step))]).run()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run was to die at {step}"
        assert os.WTERMSIG(status) == signal.SIGKILL
