"""Every file in strategies/ keeps the contract of a strategy."""

from cl.testing import StrategyContract, discover

PLUGINS = discover("strategies")

for plugin in PLUGINS:
    name = f"Test{plugin.class_name}"
    globals()[name] = type(name, (StrategyContract,), {"strategy": plugin.load()})


def test_strategies_are_found():
    assert {"naive", "replay"} <= {plugin.name for plugin in PLUGINS}
