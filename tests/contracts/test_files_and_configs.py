"""A plug-in is a file and a config: neither may stand alone, and each must name the other."""

import inspect
from pathlib import Path

import pytest

from cl.testing import configs, discover

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"strategy": "strategies", "stream": "streams", "backbone": "cl.backbones"}
GROUPS = (*PACKAGES, "optimizer", "schedule", "trainer", "tracking")
EVERY_CONFIG = [config for group in GROUPS for config in configs(group) if config.node.get("_target_")]
PLUGINS = {group: discover(package, is_deep=group == "stream") for group, package in PACKAGES.items()}
EVERY_PLUGIN = [(group, plugin) for group, plugins in PLUGINS.items() for plugin in plugins]

with_target = pytest.mark.parametrize("config", EVERY_CONFIG, ids=lambda c: f"{c.group}/{c.name}")


@pytest.mark.parametrize(("group", "plugin"), EVERY_PLUGIN, ids=lambda value: str(value))
def test_file_has_a_config(group, plugin):
    modules = {config.module for config in configs(group)}
    assert f"{plugin.package}.{plugin.name}" in modules, (
        f"no file in configs/{group}/ names {plugin.package}.{plugin.name}; a helper's name begins with an underscore"
    )


@pytest.mark.parametrize("group", sorted(PACKAGES))
def test_config_has_a_file(group):
    files = {f"{plugin.package}.{plugin.name}" for plugin in PLUGINS[group]}
    lost = {config.name: config.module for config in configs(group) if config.module not in files}
    assert not lost, f"configs/{group}/ names files that are not in {PACKAGES[group]}/: {lost}"


@pytest.mark.parametrize("group", ["strategy", "backbone"])
def test_config_is_named_after_its_file(group):
    """Streams may have several configs per file, one per data set; strategies and backbones are their file's name."""
    for plugin in discover(PACKAGES[group]):
        names = [config.name for config in configs(group) if config.module.endswith(f".{plugin.name}")]
        assert plugin.name in names, f"configs/{group}/{plugin.name}.yaml is missing; there is {names}"


@with_target
def test_target_exists_and_takes_the_keys(config):
    keys = {key: None for key in config.node if not key.startswith("_")}
    inspect.signature(config.target()).bind_partial(**keys)


@pytest.mark.parametrize("plugin", [p for group, p in EVERY_PLUGIN if group == "strategy"], ids=str)
def test_strategy_config_sits_under_its_own_name(plugin):
    """`strategy=[derpp,refresh]` merges two files, so each must have a node of its own."""
    first_line = (ROOT / "configs" / "strategy" / f"{plugin.name}.yaml").read_text().splitlines()[0]
    assert first_line == f"# @package strategy.{plugin.name}"


@pytest.mark.parametrize("config", [c for c in EVERY_CONFIG if c.group in PACKAGES], ids=str)
def test_config_repeats_no_default(config):
    """A default has one home, the Python signature; YAML holds deliberate overrides only."""
    parameters = inspect.signature(config.target()).parameters
    repeated = [
        key
        for key, value in config.node.items()
        if key in parameters and key != "dataset" and parameters[key].default == value
    ]
    assert not repeated, f"{repeated} repeat the defaults of {config.node['_target_']}"
