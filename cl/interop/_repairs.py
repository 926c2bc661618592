"""What Avalanche 0.6.0 gets wrong, put right while a strategy of theirs is hosted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cl.core import UserError
from cl.interop._quiet import quiet, require_avalanche

require_avalanche()
with quiet():
    from avalanche.training.plugins import SynapticIntelligencePlugin
    from avalanche.training.supervised import er_aml


@torch.no_grad()
def extract_weights(model: Any, target: Any, excluded_parameters: Any) -> None:
    """As theirs, with a copy.

    `param.detach().cpu().flatten()` is a copy only when the weights are on a GPU. On a CPU it is the live weights: what
    they moved is then always zero, so is every importance, and synaptic intelligence is naive training.
    """
    for name, param in SynapticIntelligencePlugin.allowed_parameters(model, excluded_parameters):
        target[name].data = param.detach().cpu().flatten().clone()


def cycle(loader: Any) -> Iterator[Any]:
    """As theirs, which looks for a batch for ever where a loader has none.

    Raises:
        UserError: fewer rows than one batch, as a class's share of a small memory is.
    """
    while True:
        if not len(loader):
            raise UserError(
                f"avalanche/ER_AML draws batches of {loader.batch_size} rows of one class, and its memory holds "
                f"{len(loader.dataset)} of some class; take a smaller trainer.batch_size or a larger mem_size"
            )
        yield from loader


@contextmanager
def repaired() -> Iterator[None]:
    """Inside, the faults are put right."""
    theirs, their_cycle = vars(SynapticIntelligencePlugin)["extract_weights"], er_aml.cycle
    SynapticIntelligencePlugin.extract_weights = staticmethod(extract_weights)
    er_aml.cycle = cycle
    try:
        yield
    finally:
        SynapticIntelligencePlugin.extract_weights = theirs
        er_aml.cycle = their_cycle
