"""Every strategy trains on every embedded stream and on every backbone: a few steps of each pair.

The fast tests are a cover of the pairs: every strategy on every usual backbone, on the stream of text and on a few of
the others, and everything with the plain strategies. A larger cover is marked slow and runs in CI; the pairs that are
left are marked grid besides, for `make test-all`.
"""

import inspect
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from cl.backbones.gpt import Gpt
from cl.backbones.hf import Hf
from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.hooks import ALL_SETTINGS
from cl.testing import configs, discover
from cl.trainer import Trainer
from streams.builtin_text import builtin_text
from streams.split import split

STRATEGIES = discover("strategies")
STREAMS = [config for config in configs("stream") if "root" not in config.node]
PROBES = [config for config in STREAMS if config.name.startswith("probes/")]
IMAGES_AND_TEXT = [config for config in STREAMS if config not in PROBES]
CONFIG = TrainerConfig(max_steps=2, batch_size=16, eval_rows=20, device="cpu")
SMALL_GPT = partial(Gpt, width=32, num_layers=2)
"""Where the stream is what is tried; on backbones the defaults are."""


class Few:
    """The first rows of a data set: strategies that look at all of it need not look at a million bytes."""

    def __init__(self, data, num_rows=100):
        self.data, self.num_rows = data, num_rows

    def __len__(self):
        return self.num_rows

    def rows(self, index):
        return self.data.rows(index)


def made(config):
    make = config.target()
    few = {"context": 32, "train_tokens": 1600} if config.name == "builtin_text" else {}
    if "train_rows" in inspect.signature(make).parameters:
        few = {"train_rows": 200 if config in PROBES else 400}
    return shortened(make(**config.arguments(seed=0) | few))


def shortened(stream):
    return stream if stream.general is None else replace(stream, general=lambda: Few(stream.general()))


def strategy_of(plugin):
    """By default values, but that hundreds of steps of finetuning show no more than a few."""
    return plugin.load()(**({"steps": 5} if plugin.name in ("fpf", "kfpf") else {}))


def trained(stream, strategy, backbone):
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return Trainer(stream, backbone, [strategy], optimizer=optimizer, config=CONFIG).run()


PLAIN = {"naive", "replay"}
USUAL = {"mlp", "convnet", "gpt", "builtin_text"}
"""Backbones and streams that every strategy meets each time, as everything meets the plain strategies."""


def pairs(others, often, seldom):
    """Test parameters: the usual pairs and each `often`-th other fast, each `seldom`-th slow, the rest in the grid."""
    for i, plugin in enumerate(STRATEGIES):
        for j, other in enumerate(others):
            is_fast = plugin.name in PLAIN or other.name in USUAL or (often and (i + j) % often == 0)
            slow = [pytest.mark.slow] if (i + j) % seldom == 0 else [pytest.mark.slow, pytest.mark.grid]
            yield pytest.param(plugin, other, marks=() if is_fast else slow, id=f"{plugin}-{other}")


ON_STREAMS = [*pairs(IMAGES_AND_TEXT, often=3, seldom=1), *pairs(PROBES, often=0, seldom=4)]


@pytest.mark.parametrize(("plugin", "config"), ON_STREAMS)
def test_strategy_on_stream(plugin, config):
    stream, strategy = made(config).first(2), strategy_of(plugin)
    backbone = SMALL_GPT if stream.info.setting == Setting.CONTINUAL_PRETRAINING else Mlp
    if "lora" in plugin.name:  # those work on adapters
        backbone = partial(Hf, lora={"rank": 2})
    if stream.info.setting not in strategy.settings:
        with pytest.raises(UserError):
            trained(stream, strategy, backbone)
        return
    if plugin.name == "gere" and stream.general is None:
        with pytest.raises(UserError, match=f"stream {stream.info.name} has none"):
            trained(stream, strategy, backbone)
        return
    result = trained(stream, strategy, backbone)
    assert result.status == "done"
    largest = 2 * math.log(stream.info.num_outputs) if stream.info.measure == "loss" else 1
    assert all(0 <= value <= largest for row in result.R for value in row)


def shared_settings(plugin, backbone):
    """Where both a strategy and a backbone can be used."""
    return sorted(plugin.load().settings & getattr(backbone.load(), "settings", ALL_SETTINGS))


BACKBONES = discover("cl.backbones")
ON_BACKBONES = [pair for pair in pairs(BACKBONES, often=0, seldom=3) if shared_settings(*pair.values)]


@pytest.mark.parametrize(("plugin", "backbone"), ON_BACKBONES)
def test_strategy_on_backbone(plugin, backbone):
    """Batch norm, recurrence, convolutions and attention, in the first setting that both declare."""
    setting = shared_settings(plugin, backbone)[0]
    if setting == Setting.CONTINUAL_PRETRAINING:
        stream = shortened(builtin_text(context=16, train_tokens=1600))
    else:
        stream = split(num_experiences=5, setting=str(setting), train_rows=100, eval_rows=50)
    try:
        outcome = trained(stream.first(2), strategy_of(plugin), backbone.load()).status
    except UserError as refusal:
        outcome = str(refusal)
    # a strategy may take some backbones only, such as those of one layer a stage, and then names the one it refuses
    assert outcome == "done" or (backbone.class_name in outcome and backbone.name != "mlp"), outcome
