"""Every file in cl/backbones/ keeps the contract of a backbone."""

from functools import partial

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


def test_backbones_are_found():
    assert "mlp" in {plugin.name for plugin in PLUGINS}
