"""One root seed, many independent named generators: adding a consumer never changes what another one draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(root: int, *names: str | int) -> int:
    """A 63-bit seed that depends on every argument; "a/b" is the same as "a", "b", which no two callers come to.

    Example:
        >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1) != derive_seed(0, "order", 2)
        True
    """
    text = "/".join(map(str, (root, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def global_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's own generators in this process: the CPU's and, where a run is on one, its GPU's."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_global_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing from where the generators stood; the run may have been on another kind of device."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class Seeds:
    """Named random generators under one root seed.

    `named` returns a long-lived generator whose state is saved with a run; `fresh` returns a new one whose draws are a
    pure function of its names, so that a position in the stream needs no saved state at all.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self._named: dict[str, torch.Generator] = {}

    def named(self, name: str) -> torch.Generator:
        if name not in self._named:
            self._named[name] = self.fresh(name)
        return self._named[name]

    def fresh(self, *names: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.root, *names))

    @contextmanager
    def as_global(self, *names: str | int) -> Iterator[None]:
        """Code inside draws from torch's global generator as if freshly seeded; the global state is restored after."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.root, *names))
            yield

    def state_dict(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self._named.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.named(name).set_state(value)
