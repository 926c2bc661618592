"""What Avalanche 0.6.0 gets wrong on a CPU, put right while a strategy of theirs is hosted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cl.interop._quiet import quiet, require_avalanche

require_avalanche()
with quiet():
    from avalanche.training.plugins import SynapticIntelligencePlugin


@torch.no_grad()
def extract_weights(model: Any, target: Any, excluded_parameters: Any) -> None:
    """As theirs, with a copy.

    `param.detach().cpu().flatten()` is a copy only when the weights are on a GPU. On a CPU it is the live weights: what
    they moved is then always zero, so is every importance, and synaptic intelligence is naive training.
    """
    for name, param in SynapticIntelligencePlugin.allowed_parameters(model, excluded_parameters):
        target[name].data = param.detach().cpu().flatten().clone()


@contextmanager
def repaired() -> Iterator[None]:
    """Inside, the faults are put right."""
    theirs = vars(SynapticIntelligencePlugin)["extract_weights"]
    SynapticIntelligencePlugin.extract_weights = staticmethod(extract_weights)
    try:
        yield
    finally:
        SynapticIntelligencePlugin.extract_weights = theirs
