"""Short and long memory of classes: activations in 8 bits, and representations that the nearest ones of decide.

Shape legend: N stored vectors, B rows, F width of the last hidden layer, C outputs of one head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255


def quantised(values: Tensor) -> dict[str, Tensor]:
    """Tensor -> its numbers between their smallest and largest in 256 steps; off by half a step at most.

    Example:
        >>> kept = quantised(torch.tensor([0.0, 0.2, 255.0]))
        >>> kept["codes"].tolist(), dequantised(kept).tolist()
        ([0, 0, 255], [0.0, 0.0, 255.0])
    """
    low, high = values.min(), values.max()
    step = ((high - low) / LEVELS).clamp(min=torch.finfo(values.dtype).tiny)
    return {"codes": ((values - low) / step).round().to(torch.uint8), "low": low, "step": step}


def dequantised(kept: Mapping[str, Tensor]) -> Tensor:
    """What is left of the numbers."""
    return kept["low"] + kept["codes"] * kept["step"]


def drawn(num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` row numbers: different ones while there are enough, with replacement otherwise."""
    if size <= num_rows:
        return torch.randperm(num_rows, generator=generator)[:size]
    return torch.randint(num_rows, (size,), generator=generator)


def votes(
    hidden_BF: Tensor, memory: Mapping[int, Mapping[str, Tensor]], num_neighbours: int, num_outputs: int
) -> Tensor:
    """Nearest neighbours among stored representations, each class seen through its own units.

    Args:
        memory: by class, `vectors` (N, F) and `mask` (F,) of the units that it used.

    Returns:
        (B, C): how many of the nearest are of each class; equal numbers are told apart by the nearest of them, by less
        than a vote.
    """
    distances, labels = [], []
    for label, kept in memory.items():
        units = kept["mask"].bool()
        own_NF, asked_BF = (F.normalize(v[:, units], dim=1) for v in (kept["vectors"].to(hidden_BF), hidden_BF))
        distances.append(torch.cdist(asked_BF, own_NF, compute_mode="donot_use_mm_for_euclid_dist"))
        labels += [label] * len(own_NF)
    distance_BN, label_N = torch.cat(distances, dim=1), torch.tensor(labels, device=hidden_BF.device)
    nearest = distance_BN.topk(min(num_neighbours, len(label_N)), dim=1, largest=False)
    count_BC = F.one_hot(label_N[nearest.indices], num_outputs).sum(1).to(hidden_BF.dtype)
    closest_BC = torch.full_like(count_BC, 2.0)
    closest_BC.scatter_reduce_(1, label_N[nearest.indices], nearest.values.to(count_BC.dtype), "amin")
    # distances on the unit sphere are 2 at most
    return count_BC - closest_BC / 4
