"""Ternary codes of hidden states: low, middle or high for every unit, two bits each.

Shape legend: N rows, T tokens, D units.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Moments:
    """Mean and standard deviation per unit over any number of pieces, in float64 (Chan et al., 1979).

    The difference E[h^2] - E[h]^2 is never formed: it has no digits left where a mean is large beside its deviation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, rows_ND: Tensor) -> None:
        """Take note of some more states."""
        if not len(rows_ND):
            return
        rows = rows_ND.detach().cpu().double()
        mean = rows.mean(0)
        apart, total = mean - self.mean, self.count + len(rows)
        squares = (rows - mean).square().sum(0)
        self.squares = self.squares + squares + apart.square() * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def deviation(self) -> Tensor:
        """(D,) of the population."""
        return (self.squares / self.count).sqrt()


def classes(states: Tensor, low_D: Tensor, high_D: Tensor) -> Tensor:
    """-1 where a state is at or below `low`, +1 where it is at or above `high`, 0 between; int8.

    Example:
        >>> classes(torch.tensor([0.0, 0.5, 2.0]), torch.zeros(3), torch.ones(3)).tolist()
        [-1, 0, 1]
    """
    return (states >= high_D).to(torch.int8) - (states <= low_D).to(torch.int8)


def packed(codes: Tensor) -> Tensor:
    """Codes (..., D) as bytes (..., ceil(D / 4)): two bits hold code + 1, the first unit in the lowest ones.

    Example:
        >>> [f"{byte:08b}" for byte in packed(torch.tensor([-1, 0, 1, 1, 0])).tolist()]
        ['10100100', '00000001']
    """
    bits = F.pad((codes + 1).to(torch.uint8), (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return bits[..., 0] | bits[..., 1] << 2 | bits[..., 2] << 4 | bits[..., 3] << 6


def unpacked(packs: Tensor, num_units: int) -> Tensor:
    """The codes of `packed`, as int8.

    Example:
        >>> unpacked(packed(torch.tensor([-1, 0, 1, 1, 0])), 5).tolist()
        [-1, 0, 1, 1, 0]
    """
    bits = torch.stack([packs >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return bits.flatten(-2)[..., :num_units].to(torch.int8) - 1


def margin_terms(
    states: Tensor, codes: Tensor, low_D: Tensor, high_D: Tensor, counted: Tensor, reduction: str = "violating"
) -> tuple[Tensor, Tensor]:
    """How far states are from the region that their code names, as sum and number; the loss is their quotient.

        v = relu(z - low)                    code -1
            relu(high - z)                   code +1
            relu(z - high) + relu(low - z)   code  0
        number: of v above 0      (reduction "violating")
                of all v          (reduction "all")

    Args:
        states: (..., D), with gradient.
        codes: (..., D) in {-1, 0, 1}.
        counted: (...) True for tokens that take part.

    Source: Zhang et al., "GeRe", 2025, equation of the threshold-based margin loss; code Qznan/GeRe.

    Example:
        >>> z, low, high = torch.tensor([[2.0, 0.0, 3.0, 0.5]]), torch.zeros(4), torch.ones(4)
        >>> total, count = margin_terms(z, torch.tensor([[-1, 1, 0, 0]]), low, high, torch.tensor([True]))
        >>> total.item(), count.item()  # 2 + 1 + 2 of three
        (5.0, 3)
    """
    low_wanted = F.relu(states - low_D)
    high_wanted = F.relu(high_D - states)
    between = F.relu(states - high_D) + F.relu(low_D - states)
    v = torch.where(codes < 0, low_wanted, torch.where(codes > 0, high_wanted, between)) * counted.unsqueeze(-1)
    return v.sum(), counted.sum() * states.shape[-1] if reduction == "all" else (v > 0).sum()
