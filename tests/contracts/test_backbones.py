"""Every file in cl/backbones/ keeps the contract of a backbone."""

from functools import partial

import pytest
from torch import nn

from cl.hooks import ALL_SETTINGS
from cl.testing import BackboneContract, discover

PLUGINS = discover("cl.backbones")

for plugin in PLUGINS:
    name = f"Test{plugin.class_name}"
    backbone = plugin.load()
    # a small form, where the defaults are too large for the rows of the contract to show everything
    small = partial(backbone, **getattr(backbone, "toy", {}))
    members = {"backbone": small, "settings": getattr(backbone, "settings", ALL_SETTINGS)}
    globals()[name] = type(name, (BackboneContract,), members)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_no_attribute_hides_a_method_of_torch(plugin):
    """Where `half()` was, a backbone once kept the length of a half."""
    contract = globals()[f"Test{plugin.class_name}"]()
    model = contract.build(min(contract.settings))
    given = [(part, name) for part in model.modules() for name in vars(part)]
    assert not [(type(part).__name__, name) for part, name in given if callable(getattr(nn.Module, name, None))]
    model.half()


def test_backbones_are_found():
    assert "mlp" in {plugin.name for plugin in PLUGINS}
