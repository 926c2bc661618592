"""Where each parameter of a backbone lies in a vector of numbers, and how numbers become weights.

    weight = offset + scale * number,        one offset and one scale for each parameter tensor

With numbers of mean 0 and variance 1, weights have the scale at which the backbone itself was drawn; constants, such as
the ones of batch norm, are offsets.

Shape legend: N numbers of a generated network, T conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Ranges = Sequence[tuple[int, int]]
"""Numbers `[start, stop)`."""
SPREAD_OF_CONSTANTS = 0.1
"""Scale of a parameter that starts constant, in a module where nothing is drawn at random."""


@dataclass(frozen=True)
class Place:
    """One parameter: the numbers `[start, stop)`, and every name under which the backbone has it."""

    names: tuple[str, ...]
    shape: torch.Size
    start: int
    stop: int
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Layout:
    """The parameters of a backbone one after the other, first layer first."""

    places: tuple[Place, ...]
    is_scaled: bool = field(default=True)

    def __len__(self) -> int:
        return self.places[-1].stop

    @staticmethod
    def of(
        backbone: nn.Module, drawn: Mapping[str, nn.Parameter], same: Mapping[str, Sequence[str]], keeps_scale: bool
    ) -> Layout:
        """The layout of the parameters `drawn`, by name; tied ones have one place.

        Args:
            same: prefix of a name -> prefixes of parameters that share its numbers, as heads do.
            keeps_scale: take scale and offset from the values; else they are 1 and 0.
        """
        others = {other: first for first, prefixes in same.items() for other in prefixes}
        names: dict[int, list[str]] = {}
        for name, p in drawn.items():
            prefix = next((other for other in others if name.startswith(other)), None)
            owner = p if prefix is None else drawn[others[prefix] + name[len(prefix) :]]
            names.setdefault(id(owner), []).append(name)
        by_id = {id(p): p for p in drawn.values()}
        places, start = [], 0
        for key, every in names.items():
            p = by_id[key]
            scale, offset = _statistics(backbone, every[0], p) if keeps_scale else (1.0, 0.0)
            places.append(Place(tuple(every), p.shape, start, start + p.numel(), scale, offset))
            start += p.numel()
        return Layout(tuple(places), keeps_scale)

    def weights(self, numbers_N: Tensor) -> dict[str, Tensor]:
        """Name -> tensor."""
        found: dict[str, Tensor] = {}
        for place, piece in zip(self.places, numbers_N.split(self.sizes), strict=True):
            value = piece.view(place.shape)
            if self.is_scaled:
                value = value * place.scale
                value = value + place.offset if place.offset else value
            found |= dict.fromkeys(place.names, value)
        return found

    def numbers(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(N,) the numbers that become these weights."""
        pieces = [(weights[place.names[0]].flatten() - place.offset) / place.scale for place in self.places]
        return torch.cat(pieces)

    def flat(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """(N,) one tensor per parameter, in order and as they are."""
        return torch.cat([vectors[place.names[0]].flatten() for place in self.places])

    def distances(
        self,
        left_TN: Tensor,
        right_TN: Sequence[Tensor],
        importance_TN: Tensor | None = None,
        skipped: Sequence[Ranges] = (),
    ) -> Tensor:
        """(T,) squared distance between the weights of two sets of numbers, each square times its importance.

        Args:
            right_TN: (N,) for each of T; no gradient goes there.
            skipped: for each of T, numbers that do not count.
        """
        sums: Tensor = _Distances.apply(left_TN, right_TN, importance_TN, skipped, self)
        return sums

    def weigh(self, apart_N: Tensor, importance_N: Tensor | None = None) -> Tensor:
        """The squared distance between the weights of two sets of numbers that are so far apart.

        `apart_N` becomes half the gradient of it, in place.
        """
        own_N = None if importance_N is None else apart_N.clone()
        if importance_N is not None:
            apart_N.mul_(importance_N)
        total = apart_N.new_zeros(()) if self.is_scaled else torch.dot(apart_N, apart_N if own_N is None else own_N)
        for place in self.places if self.is_scaled else ():
            piece = apart_N[place.start : place.stop]
            total += place.scale**2 * torch.dot(piece, piece if own_N is None else own_N[place.start : place.stop])
            piece.mul_(place.scale**2)
        return total

    @property
    def sizes(self) -> list[int]:
        return [place.stop - place.start for place in self.places]


def _statistics(backbone: nn.Module, name: str, p: Tensor) -> tuple[float, float]:
    """Scale and offset of a parameter; one that starts constant takes the scale of its module's others."""
    mean, spread = p.detach().mean().item(), p.detach().std(correction=0).item()
    if spread > 1e-12:
        # drawn around 0, or a table that is not, such as rates of decay
        return spread, mean if abs(mean) > spread else 0.0
    owner = backbone.get_submodule(name.rpartition(".")[0])
    beside = [q.detach().std(correction=0).item() for q in owner.parameters(recurse=False)]
    return next((s for s in beside if s > 1e-12), SPREAD_OF_CONSTANTS), mean


class _Distances(torch.autograd.Function):
    """As autograd would, in two passes over memory forward and one backward: they are what the penalty costs."""

    @staticmethod
    def forward(
        ctx: Any,
        left_TN: Tensor,
        right_TN: Sequence[Tensor],
        importance_TN: Tensor | None,
        skipped: Sequence[Ranges],
        layout: Layout,
    ) -> Tensor:
        pull_TN = torch.empty_like(left_TN)
        for pull_N, left_N, right_N in zip(pull_TN, left_TN, right_TN, strict=True):
            torch.sub(left_N, right_N, out=pull_N)
        for pull_N, ranges in zip(pull_TN, skipped, strict=False):
            for start, stop in ranges:
                pull_N[start:stop] = 0
        importance = [None] * len(pull_TN) if importance_TN is None else importance_TN
        totals = [layout.weigh(pull_N, each_N) for pull_N, each_N in zip(pull_TN, importance, strict=True)]
        ctx.save_for_backward(pull_TN)
        return torch.stack(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        (pull_TN,) = ctx.saved_tensors
        return pull_TN * (2 * gradient_T[:, None]), None, None, None, None
