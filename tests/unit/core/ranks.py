"""Runs that one process and several must agree on. Run as a script by test_distributed, once in every process.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python ranks.py FOLDER
"""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from cl import frozen
from cl.backbones.armt import Armt
from cl.backbones.gated_fifo import GatedFifo
from cl.backbones.gpt import Gpt
from cl.backbones.memoria import Memoria
from cl.config import TrainerConfig
from cl.core import IGNORED, Setting, TensorData
from cl.distributed import World
from cl.hooks import Strategy
from cl.ledger import NonFiniteLoss
from cl.observe import Observer
from cl.schedules import cosine
from cl.shards import own
from cl.testing import ToyNet, toy_stream
from cl.testing.plugins import discover
from cl.trainer import Trainer

TEXT, IMAGES = Setting.CONTINUAL_PRETRAINING, Setting.DOMAIN_INCREMENTAL
STOP = 11
"""Runs have 18 steps, 6 in each experience."""


class Blocks(ToyNet):
    """With a list of blocks, which FSDP shards one by one, and dropout off: its draws differ between processes."""

    def __init__(self, info):
        super().__init__(info)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def features(self, inputs):
        hidden = super().features(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
        return hidden


class Dropped(Blocks):
    """Its draws differ between processes."""

    def features(self, inputs):
        return nn.functional.dropout(super().features(inputs), 0.3, self.training)


class Adapted(nn.Module):
    """A frozen layer in half precision, and one in float32 that is trained."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter = nn.Linear(12, 12).half().requires_grad_(False), nn.Linear(12, 12)

    def forward(self, hidden):
        return self.base(hidden.half()).float() + self.adapter(hidden)


class Given(Blocks):
    """With weights that it was given, inside of blocks and beside them."""

    def __init__(self, info):
        super().__init__(info)
        self.blocks = nn.ModuleList(Adapted() for _ in range(2))
        self.first.requires_grad_(False)
        given = [name for name, p in self.named_parameters() if not p.requires_grad]
        self.given = frozen.Given("here", frozenset(given))


class Overflow(Strategy):
    """Raises the loss scale for one step in the middle of the run, so that gradients of some weights overflow."""

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})

    def __init__(self):
        self.name = "overflow"

    def on_batch(self, state, batch):
        if state.step in (7, 8) and state.micro_step == 0:
            state.scaler.update(2.0**20 if state.step == 7 else 2.0**10)
        return batch


class Break(Strategy):
    """Makes one weight infinite when an experience ends, where no loss shows it."""

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})

    def __init__(self):
        self.name = "break"

    def on_experience_end(self, state):
        with torch.no_grad():
            own(state.parameters()["head.bias"]).fill_(math.inf)


class Watch(Observer):
    def __init__(self, stop_at=None):
        self.losses, self.stop_at = [], stop_at

    def on_step(self, state, losses, lr):
        self.losses.append((state.step, losses["loss"]))


class Stop(Strategy):
    """Asks one process only to stop: all must hear of it."""

    settings = frozenset(Setting)
    parallel = frozenset({"ddp", "fsdp"})

    def __init__(self, at):
        self.at = at

    def on_step_end(self, state, batch, output):
        if state.step == self.at and state.world.rank == state.world.size - 1:
            self.trainer.request_stop()


def ragged(data):
    """Text in which rows have different numbers of tokens to learn."""
    targets = data.targets.clone()
    for row in range(0, len(targets), 3):
        targets[row, row % 7 :] = IGNORED
    return TensorData(data.inputs, targets, data.experience_id)


def jitter(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def stream_of(setting):
    stream = toy_stream(setting)
    if setting != TEXT:
        return replace(stream, augment=jitter)
    experiences = [replace(each, load=lambda load=each.load: ragged(load())) for each in stream.experiences]
    return replace(stream, experiences=experiences)


def run(strategies, setting, parallel="none", run_dir=None, resume=False, stop_at=None, backbone=Blocks, **config):
    """(losses by step, R, weights, rows counted) of a toy run. A batch of 17 rows makes uneven shares."""
    watch = Watch()
    strategies = [*strategies, Stop(stop_at)]
    options = {"max_steps": 6, "batch_size": 17, "accumulation": 2, "clip_norm": 0.5, "device": "cpu"}
    # `cl run` makes it in a context of its own as well
    with warnings.catch_warnings(record=True):
        trainer = Trainer(
            stream_of(setting),
            backbone,
            strategies,
            optimizer=partial(torch.optim.AdamW, lr=0.01),
            schedule=cosine,
            config=TrainerConfig(**(options | config | {"parallel": parallel})),
            observers=[watch],
            run_dir=run_dir,
            fingerprint="one",
        )
    for strategy in strategies:
        strategy.trainer = trainer
    exchanges = []
    if parallel == "ddp":
        trainer.state.network.register_comm_hook(exchanges, counted)
    try:
        with warnings.catch_warnings(record=True) as told:
            result = trainer.run(resume=resume)
    except NonFiniteLoss as error:
        return {"error": str(error)}
    state = trainer.state.state_dict()
    return {
        "losses": watch.losses,
        "R": result.R,
        "traces": result.traces,
        "told": [str(warning.message) for warning in told],
        "exchanges": len(exchanges),
        "status": result.status,
        "weights": state["model"],
        "optimizer": state["optimizer"],
        "counted": [trainer.state.tokens, trainer.state.spent.forwards, trainer.state.spent.backwards],
        "strategies": [strategy.state_dict() for strategy in strategies],
        "wrote": run_dir is not None and trainer.ledger.run_dir is not None,
    }


def counted(exchanges, bucket):
    exchanges.append(bucket.index())
    return allreduce_hook(None, bucket)


def cases():
    """(name, strategy, setting, wrapper): every strategy that declares a wrapper, in a setting that it declares."""
    found = []
    for plugin in discover("strategies"):
        kind = plugin.load()
        for setting in (TEXT, IMAGES):
            if setting in kind.settings:
                found += [(plugin.name, kind, setting, wrapper) for wrapper in sorted(kind.parallel)]
    return found


def made(kind):
    return [kind(**kind.contract.toy)]


GERE = {
    # a mean over violations, of which processes have different numbers, and a weight from the losses of all
    "tm": {"loss": "tm", "weight": "dynamic", "general_batch_size": 5},
    # one row: the other process has none
    "l2": {"loss": "l2", "weight": 2.0, "general_weight": 0.0, "general_batch_size": 1},
}


BACKBONES = {
    # lists inside of blocks, lists of lists, lists that are read by parts; what carries over is left out
    "moe": partial(Gpt, width=8, num_layers=2, num_heads=2, mlp="moe(experts=3, balance=0.0)"),
    "cms": partial(Gpt, width=8, num_layers=1, num_heads=2, mlp="cms"),
    "armt": partial(Armt, segment=32, width=8, num_layers=2, num_heads=2),
    "gated_fifo": partial(GatedFifo, segment=32, width=8, num_layers=1, num_heads=2),
    "memoria": partial(Memoria, segment=4, width=8, num_layers=1, num_heads=2),
}


def verbs(world):
    """What two processes say to each other, of which the second knows twice as much."""
    known = torch.tensor([1.0 + world.rank], requires_grad=True)
    pooled = world.pooled(known.sum() * 6, torch.tensor(world.rank))
    return {
        "every": world.every({"rank": world.rank, "rows": torch.arange(world.rank)}),
        "anywhere": world.anywhere([False, world.rank == 1, world.rank == 0]),
        "mean": world.mean({"a": known.sum(), "b": torch.tensor([2.0, 4.0]) * world.rank}),
        "pooled": (pooled.item(), *torch.autograd.grad(pooled, known)),
        "nothing": world.pooled(known.sum() * 0, torch.tensor(0)).item(),
        "firsts": world.firsts(known.detach().clone()),
        "joined": {rows: world.joined(torch.arange(rows)[world.shown(rows)], rows) for rows in (1, 2, 5)},
    }


def made_gere(name):
    from strategies.gere import Gere

    return [Gere(**GERE[name], samples=20, source="first")]


def main(folder):
    torch.set_num_threads(1)
    from strategies.agem import Agem
    from strategies.derpp import Derpp
    from strategies.gem import Gem
    from strategies.naive import Naive
    from strategies.replay import Replay

    found = {}
    for name, kind, setting, wrapper in cases():
        found[f"{name}-{setting}-{wrapper}"] = run(made(kind), setting, wrapper)
    derpp = [Derpp(capacity=40)]
    found["stopped-derpp"] = run(derpp, IMAGES, "ddp", folder / "two-derpp", stop_at=STOP, checkpoint_every=4)
    for kind in (Agem, Gem):
        found[f"dropped-{kind.name}"] = run(made(kind), IMAGES, "ddp", backbone=Dropped)
    found["heads"] = run([Replay(capacity=40)], Setting.TASK_INCREMENTAL, "ddp")
    found["verbs"] = verbs(World.of("ddp"))
    for wrapper in ("ddp", "fsdp"):
        found[f"reset-{wrapper}"] = run([Naive()], IMAGES, wrapper, reset_optimizer=True)
        found |= {
            f"{name}-{wrapper}": run([Naive()], TEXT, wrapper, backbone=backbone)
            for name, backbone in BACKBONES.items()
        }
        found[f"overflow-{wrapper}"] = run([Overflow()], IMAGES, wrapper, precision="fp16")
        found[f"given-{wrapper}"] = run([Naive()], TEXT, wrapper, folder / f"given-{wrapper}", backbone=Given)
        found[f"broken-{wrapper}"] = run([Break()], IMAGES, wrapper, folder / f"broken-{wrapper}")
        found |= {f"gere-{name}-{wrapper}": run(made_gere(name), TEXT, wrapper) for name in GERE}
        found[f"stopped-{wrapper}"] = run(
            [Replay(capacity=40)], TEXT, wrapper, folder / f"two-{wrapper}", stop_at=STOP, checkpoint_every=4
        )
        found[f"resumed-{wrapper}"] = run([Replay(capacity=40)], TEXT, wrapper, folder / f"one-{wrapper}", resume=True)
        drops = partial(run, [Replay(capacity=40)], TEXT, wrapper, folder / f"drops-{wrapper}", backbone=Dropped)
        found[f"drops-{wrapper}"] = run([Replay(capacity=40)], TEXT, wrapper, backbone=Dropped)
        found[f"drops-stopped-{wrapper}"] = drops(stop_at=STOP)
        found[f"drops-resumed-{wrapper}"] = drops(resume=True)
    rank = torch.distributed.get_rank()
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
