"""Every file in cl/backbones/ keeps the contract of a backbone."""

from cl.testing import BackboneContract, discover

PLUGINS = discover("cl.backbones")

for plugin in PLUGINS:
    name = f"Test{plugin.class_name}"
    globals()[name] = type(name, (BackboneContract,), {"backbone": plugin.load()})


def test_backbones_are_found():
    assert "mlp" in {plugin.name for plugin in PLUGINS}
