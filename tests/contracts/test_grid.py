"""Every strategy trains on every embedded stream and on every backbone: a few steps of each pair."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.testing import configs, discover
from cl.trainer import Trainer
from streams.split import split

STRATEGIES = discover("strategies")
STREAMS = [config for config in configs("stream") if "root" not in config.node]
CONFIG = TrainerConfig(max_steps=2, batch_size=16, eval_rows=20, device="cpu")


def made(config):
    node = OmegaConf.to_container(OmegaConf.create({"seed": 0, "stream": config.node}), resolve=True)["stream"]
    del node["_target_"]
    return config.target()(**node)


def trained(stream, strategy, backbone):
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return Trainer(stream, backbone, [strategy], optimizer=optimizer, config=CONFIG).run()


@pytest.mark.parametrize("config", STREAMS, ids=str)
@pytest.mark.parametrize("plugin", STRATEGIES, ids=str)
def test_strategy_on_stream(plugin, config):
    stream, strategy = made(config).first(2), plugin.load()()
    if stream.info.setting not in strategy.settings:
        with pytest.raises(UserError):
            trained(stream, strategy, Mlp)
        return
    result = trained(stream, strategy, Mlp)
    assert result.status == "done"
    assert all(0 <= value <= 1 for row in result.R for value in row)


@pytest.mark.parametrize("backbone", discover("cl.backbones"), ids=str)
@pytest.mark.parametrize("plugin", STRATEGIES, ids=str)
def test_strategy_on_backbone(plugin, backbone):
    """Batch norm, recurrence and convolutions, in the first setting that the strategy declares."""
    strategy = plugin.load()()
    image_settings = sorted(strategy.settings - {Setting.CONTINUAL_PRETRAINING})
    if not image_settings:
        pytest.skip("the strategy is for text")
    stream = split(num_experiences=5, setting=str(image_settings[0]), train_rows=100, eval_rows=50).first(2)
    assert trained(stream, strategy, backbone.load()).status == "done"
