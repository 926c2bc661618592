"""Every file in cl/backbones/ keeps the contract of a backbone."""

from cl.core import Setting
from cl.hooks import ALL_SETTINGS
from cl.testing import BackboneContract, discover

PLUGINS = discover("cl.backbones")

for plugin in PLUGINS:
    name = f"Test{plugin.class_name}"
    backbone = plugin.load()
    members = {"backbone": backbone, "settings": getattr(backbone, "settings", ALL_SETTINGS)}
    if Setting.CONTINUAL_PRETRAINING in members["settings"]:
        members["input_shape"] = (16,)
    globals()[name] = type(name, (BackboneContract,), members)


def test_backbones_are_found():
    assert "mlp" in {plugin.name for plugin in PLUGINS}
