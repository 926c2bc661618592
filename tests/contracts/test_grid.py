"""Every strategy trains on every embedded stream and on every backbone: a few steps of each pair.

The fast tests are a cover of the pairs: every strategy on every usual backbone, on the stream of text and on a few of
the others, and everything with the plain strategies. A larger cover is marked slow and runs in CI; the pairs that are
left are marked grid besides, for `make test-all`.
"""

import inspect
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from cl.backbones._spec import plugin as mixer_plugin
from cl.backbones._spec import plugin_names
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
"""Where the stream is what is tried."""


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


def strategy_of(plugin, **given):
    """By default values, but that hundreds of steps of finetuning show no more than a few."""
    return plugin.load()(**given, **({"steps": 5} if plugin.name in ("fpf", "kfpf") else {}))


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


TINY = {"width": 16, "num_heads": 2}
NODES = [config.node for config in configs("backbone") if "blocks" in config.node]
CONFIGURED = {node["blocks"].partition("(")[0]: node for node in NODES}
"""By the block of the decoder that a config is of."""


@dataclass(frozen=True)
class Column:
    """A network that strategies are tried on; `make` is called with the stream's info."""

    name: str
    make: partial
    is_memory: bool = True

    def __str__(self):
        return self.name

    @property
    def kind(self):
        return self.make.func

    def made_for(self, plugin):
        """The strategy and the network, with what the strategy asks for where it refuses a decoder as it is."""
        given, make = {}, self.make
        if self.is_memory and "others" in inspect.signature(plugin.load()).parameters:
            given["others"] = "freeze"
        if self.is_memory and "lora" in plugin.name and "lora" in inspect.signature(self.kind).parameters:
            make = partial(make, lora={"rank": 2})
        return strategy_of(plugin, **given), make


def without_memory():
    """Backbones without a memory, by their defaults."""
    return [Column(p.name, partial(p.load()), is_memory=False) for p in BACKBONES if not hasattr(p.load(), "lifetime")]


def with_memory():
    """Memories around a decoder, and its blocks with what their config says besides: so small that rows of eight steps
    cross the borders of segments and chunks, and leave windows."""
    for plugin in BACKBONES:
        kind = plugin.load()
        # without it nothing of the engrams outlives a batch
        kept = {"persist": 2} if plugin.name == "memoria" else {}
        if hasattr(kind, "lifetime"):
            yield Column(plugin.name, partial(kind, **(TINY | {"num_layers": 2} | kind.toy | kept)))
    for name in plugin_names("mixers"):
        if name not in {"attention", *(plugin.name for plugin in BACKBONES)}:
            given = {key: value for key, value in CONFIGURED.get(name, {}).items() if key not in ("_target_", "blocks")}
            words = (mixer_plugin("mixers", name, "").examples or (name,))[0]
            yield Column(name, partial(Gpt, **TINY, num_layers=1, blocks=words, **given))


def shared_settings(plugin, column):
    """Where both a strategy and a backbone can be used."""
    return sorted(plugin.load().settings & getattr(column.kind, "settings", ALL_SETTINGS))


BACKBONES = discover("cl.backbones")
EVERY_PAIR = [*pairs(without_memory(), often=0, seldom=3), *pairs(list(with_memory()), often=0, seldom=5)]
ON_BACKBONES = [pair for pair in EVERY_PAIR if shared_settings(*pair.values)]


@pytest.mark.parametrize(("plugin", "column"), ON_BACKBONES)
def test_strategy_on_backbone(plugin, column):
    """Batch norm, recurrence, convolutions, attention and every memory, in the first setting that both declare."""
    setting = shared_settings(plugin, column)[0]
    if setting == Setting.CONTINUAL_PRETRAINING:
        context = 8 if column.is_memory else 16
        stream = shortened(builtin_text(context=context, train_tokens=100 * context))
    else:
        stream = split(num_experiences=5, setting=str(setting), train_rows=100, eval_rows=50)
    strategy, make = column.made_for(plugin)
    try:
        outcome = trained(stream.first(2), strategy, make).status
    except UserError as refusal:
        outcome = str(refusal)
    # a strategy may take some backbones only, such as those of one layer a stage, and then names the one it refuses
    assert outcome == "done" or (column.kind.__name__ in outcome and column.name != "mlp"), outcome
