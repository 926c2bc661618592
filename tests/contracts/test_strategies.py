"""Every file in strategies/ keeps the contract of a strategy."""

from importlib.util import find_spec

import pytest

from cl.backbones.mlps.swiglu import Swiglu
from cl.testing import StrategyContract, ToyNet, discover

PLUGINS = discover("strategies")


class LoraToy(ToyNet):
    """The toy network with its weights frozen and an adapter beside each of them."""

    def __init__(self, info):
        super().__init__(info)
        from peft import LoraConfig, inject_adapter_in_model

        self.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["first", "head"]), self)


class FfnToy(ToyNet):
    """The toy network with an FFN under its head."""

    def __init__(self, info):
        super().__init__(info)
        self.mlp = Swiglu(self.num_features, hidden=4)

    def features(self, inputs):
        hidden = super().features(inputs)
        return hidden + self.mlp(hidden)[0]


for plugin in PLUGINS:
    name = f"Test{plugin.class_name}"
    own = {"strategy": plugin.load()}
    if "lora" in plugin.name:
        own["backbone"] = LoraToy
    if plugin.name == "hierarchical_ffn_memory":
        own["backbone"] = FfnToy
    contract = type(name, (StrategyContract,), own)
    if "lora" in plugin.name:
        contract = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")(contract)
    globals()[name] = contract


def test_strategies_are_found():
    assert {"naive", "replay"} <= {plugin.name for plugin in PLUGINS}
