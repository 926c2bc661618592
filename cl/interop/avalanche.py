"""Avalanche both ways; everything that knows it is here and in the files beside this one.

    from cl.interop.avalanche import from_avalanche, as_benchmark, as_plugin, as_model, MLflowLogger

| name | what it is |
|---|---|
| `from_avalanche(benchmark)` | a benchmark of Avalanche as a stream of ours; also `streams.from_avalanche` |
| `stream(name)` | a classic benchmark, or one that a function of yours builds; `stream=avalanche/NAME` |
| `EWC`, `Replay`, ... | a strategy of Avalanche as one of ours; `strategy=avalanche/NAME` |
| `as_benchmark(stream)`, `as_model(backbone)` | ours as a benchmark and a model of Avalanche |
| `as_plugin(*strategies)` | strategies of ours as a plugin for Avalanche's templates |
| `Template`, `with_our_hooks(cls)` | a template that also calls the hooks Avalanche has no callback for |
| `train_in_template(...)` | all of that at once, with the draws of our own loop |
| `ContinualMetrics()`, `MLflowLogger()` | our metrics and our tracker, as metric and logger of Avalanche |

Avalanche is imported when one of these is first used, and not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cl.interop.catalog import METHODS

HOMES = {
    "from_avalanche": "_streams",
    "stream": "_classic",
    "as_benchmark": "_benchmark",
    "as_model": "_network",
    "as_plugin": "_plugin",
    "Template": "_template",
    "with_our_hooks": "_template",
    "train_in_template": "_template",
    "fast_fetching": "_fetch",
    "ContinualMetrics": "_logging",
    "MLflowLogger": "_logging",
    "TrackerLogger": "_logging",
    "strategy_class": "_theirs",
    "Theirs": "_theirs",
    "Own": "_theirs",
}
"""Name -> file beside this one."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"cl.interop.{HOMES[name]}"), name)
    if name in METHODS:
        return import_module("cl.interop._theirs").strategy_class(name)
    raise AttributeError(f"cl.interop.avalanche has no {name!r}; it has {', '.join([*HOMES, *METHODS])}")


def __dir__() -> list[str]:
    return [*HOMES, *METHODS]
