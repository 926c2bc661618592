"""Every strategy trains on every embedded stream and on every backbone: a few steps of each pair."""

import math
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
CONFIG = TrainerConfig(max_steps=2, batch_size=16, eval_rows=20, device="cpu")


def made(config):
    # strategies that look at a whole experience need not look at a million bytes
    few = {"train_tokens": 6400} if config.name == "builtin_text" else {}
    return config.target()(**config.arguments(seed=0) | few)


def strategy_of(plugin):
    """By default values, but that hundreds of steps of finetuning show no more than a few."""
    return plugin.load()(**({"steps": 5} if plugin.name in ("fpf", "kfpf") else {}))


def trained(stream, strategy, backbone):
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return Trainer(stream, backbone, [strategy], optimizer=optimizer, config=CONFIG).run()


PLAIN, USUAL = {"naive", "replay"}, {"mlp", "convnet", "gpt"}
"""Every strategy meets these backbones and every stream but the probes each time, and everything meets these
strategies; the other pairs are slow."""


def met(plugin, other, is_usual):
    """A pair as a test parameter."""
    marks = () if is_usual or plugin.name in PLAIN else pytest.mark.slow
    return pytest.param(plugin, other, marks=marks, id=f"{plugin}-{other}")


ON_STREAMS = [met(p, s, not s.name.startswith("probes/")) for p in STRATEGIES for s in STREAMS]


@pytest.mark.parametrize(("plugin", "config"), ON_STREAMS)
def test_strategy_on_stream(plugin, config):
    stream, strategy = made(config).first(2), strategy_of(plugin)
    backbone = Gpt if stream.info.setting == Setting.CONTINUAL_PRETRAINING else Mlp
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
ON_BACKBONES = [met(p, b, b.name in USUAL) for b in BACKBONES for p in STRATEGIES if shared_settings(p, b)]


@pytest.mark.parametrize(("plugin", "backbone"), ON_BACKBONES)
def test_strategy_on_backbone(plugin, backbone):
    """Batch norm, recurrence, convolutions and attention, in the first setting that both declare."""
    setting = shared_settings(plugin, backbone)[0]
    if setting == Setting.CONTINUAL_PRETRAINING:
        stream = builtin_text(context=16, train_tokens=1600)
    else:
        stream = split(num_experiences=5, setting=str(setting), train_rows=100, eval_rows=50)
    try:
        outcome = trained(stream.first(2), strategy_of(plugin), backbone.load()).status
    except UserError as refusal:
        outcome = str(refusal)
    # a strategy may take some backbones only, such as those of one layer a stage, and then names the one it refuses
    assert outcome == "done" or (backbone.class_name in outcome and backbone.name != "mlp"), outcome
