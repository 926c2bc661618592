"""Weights that a run was given and has not changed, which its checkpoints name and do not hold.

Whatever freezes or changes weights, what counts are their values: one that is still what the pretrained model had is
left out and known by a hash; one that a strategy has merged an adapter into is kept like a trained one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl.core import UserError
from cl.shards import gathered


@dataclass(frozen=True)
class Given:
    """What a backbone tells as its attribute `given` when it was not drawn, but read from a model on disk.

    Args:
        source: folder or hub id.
        names: of its parameters that building it again gives again, whatever the seed.
    """

    source: str
    names: frozenset[str]


def frozen_weights(model: nn.Module) -> dict[str, str]:
    """Hash by name of what a model was given and does not train; all processes must ask."""
    state = model.state_dict(keep_vars=True)
    names = [name for name, _ in _given(model) if name in state and not state[name].requires_grad]
    return _hashed(model, names)


def unchanged(model: nn.Module, frozen: Mapping[str, str]) -> dict[str, str]:
    """Those of some hashes that still hold; all processes must ask."""
    found = _hashed(model, frozen)
    return {name: told for name, told in frozen.items() if found.get(name) == told}


def require_unchanged(model: nn.Module, frozen: Mapping[str, str]) -> None:
    """What a checkpoint left out must be what the model has.

    Raises:
        UserError: another model was read than the one that the run was given.
    """
    others = sorted(frozen.keys() - unchanged(model, frozen).keys())
    if others:
        sources = ", ".join(sorted({source for _, source in _given(model)})) or "none"
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise UserError(
            f"the pretrained model ({sources}) is not the one that the run began with, of which checkpoints hold only "
            f"what has changed: {others[0]}{more} differ; put the old files back, or start a new run"
        )


def _given(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name in the whole model, source) of every parameter that was given."""
    for path, module in model.named_modules():
        given = getattr(module, "given", None)
        if isinstance(given, Given):
            for name in given.names:
                yield (f"{path}.{name}" if path else name), given.source


def _hashed(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    state = model.state_dict()
    here = sorted(name for name in names if name in state)
    # as many at a time as there are threads: of a model that is spread, no more is whole in one place
    found: list[str] = []
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        for low in range(0, len(here), count):
            found += pool.map(_hash, [gathered(state[name]) for name in here[low : low + count]])
    return dict(zip(here, found, strict=True))


def _hash(weight: Tensor) -> str:
    told = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    told.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()[:32]
