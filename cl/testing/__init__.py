"""Contract suites to inherit, in this repository and in yours (docs/extending.md shows how). Needs pytest.

| name | tests |
|---|---|
| `StrategyContract` | a strategy, on two-second toy streams of every setting it declares |
| `StreamContract` | a stream |
| `BackboneContract` | a backbone |
| `toy_stream`, `ToyNet` | what the suites run on; for your own tests |
| `train` | a toy run and what it left: losses, weights, work counted |
| `pretended_card`, `CARD` | a graphics card that is not there: finds what is made on the wrong device |
| `discover`, `configs` | the plug-ins of a folder, the configs of a group, by listing |
"""

from cl.testing import _asserts as _asserts
from cl.testing.backbone import BackboneContract
from cl.testing.card import CARD, pretended_card
from cl.testing.plugins import Config, Plugin, configs, discover
from cl.testing.probe import Record, equal, train
from cl.testing.strategy import StrategyContract, naive_run
from cl.testing.stream import StreamContract
from cl.testing.toy import ToyNet, toy_stream

__all__ = [
    "CARD",
    "BackboneContract",
    "Config",
    "Plugin",
    "Record",
    "StrategyContract",
    "StreamContract",
    "ToyNet",
    "configs",
    "discover",
    "equal",
    "naive_run",
    "pretended_card",
    "toy_stream",
    "train",
]
