"""What the recurrent mixers share: how a cell is named, precision, ages of documents, trainable timescales.

A cell is a file in `scan_cells/` (states by a linear scan) or `rnn_cells/` (states by a nonlinear recurrence).

Shape legend: B rows, T tokens, D width of the mixer, F units.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._spec import Spec, build, parse_one
from cl.core import UserError
from cl.shards import gathered
from kernels.common.fused import gated


def make_cell(cell: str | Spec, folder: str, option: str, width: int, units: int, **shared: Any) -> Any:
    """The cell of so many units that a word such as `mingru`, or `hippo(order=4)`, stands for; `shared` as in `build`.

    Raises:
        UserError: there is none of this name, or it has no such option.
    """
    require_width("units", units)
    spec = cell if isinstance(cell, Spec) else parse_one(cell, option)
    return build(spec, folder, option, width, {"units": units}, **shared)


def wide(x: Tensor) -> Tensor:
    """Float64 as it is, all else in float32: what states are computed in, under autocast too."""
    return x if x.dtype in (torch.float64, torch.complex128, torch.complex64) else x.float()


def ages(num_tokens: int, reset_BT: Tensor | None, before_B: Tensor) -> Tensor:
    """(B, T) which token of its document each one is, counted from 1; `before_B` were read of the open document.

    Example:
        >>> ages(4, torch.tensor([[False, False, True, False]]), torch.tensor([5.0])).tolist()
        [[6.0, 7.0, 1.0, 2.0]]
    """
    place_T = torch.arange(1, num_tokens + 1, device=before_B.device, dtype=before_B.dtype)
    age_BT = before_B[:, None] + place_T
    if reset_BT is None:
        return age_BT
    start_BT = (place_T * reset_BT).cummax(1).values
    return torch.where(start_BT > 0, place_T - start_BT + 1, age_BT)


class Timescale(nn.Module):
    """Trainable time constants tau = 1 + softplus(rho) > 1, one for each unit, in steps.

    Args:
        units: F.
        shortest, longest: in steps; the initial values are spread between them on a logarithmic scale.

    Raises:
        UserError: not 1 < shortest <= longest.
    """

    def __init__(self, units: int, shortest: float, longest: float) -> None:
        super().__init__()
        if not 1 < shortest <= longest:
            raise UserError(
                f"the time constants go from {shortest} to {longest} steps; they must be above 1 and in this order"
            )
        tau_F = torch.logspace(0, 1, units, base=longest / shortest) * shortest if units > 1 else None
        start_F = torch.tensor([shortest]) if tau_F is None else tau_F
        # softplus of it is tau - 1 again, however long: exp(tau) would not be finite
        above_F = start_F - 1
        self.rho = nn.Parameter(above_F + torch.log(-torch.expm1(-above_F)))

    def forward(self) -> Tensor:
        """(F,) tau."""
        return 1 + F.softplus(self.rho)


def time_constants(network: nn.Module) -> dict[str, Tensor]:
    """Mean and largest tau of all units, in steps; empty where there are none, or a hypernetwork generates them.

    Example:
        >>> {name: round(float(tau), 4) for name, tau in time_constants(Timescale(3, 2.0, 8.0)).items()}
        {'tau_mean': 4.6667, 'tau_max': 8.0}
    """
    found = [
        each for each in network.modules() if isinstance(each, Timescale) and next(each.parameters(), None) is not None
    ]
    if not found:
        return {}
    with torch.no_grad():
        tau = torch.cat([gathered(each()) for each in found])
    return {"tau_mean": tau.mean(), "tau_max": tau.max()}


def gated_out(y_BTF: Tensor, x_BTD: Tensor, gate: nn.Linear | None, out: nn.Linear) -> Tensor:
    """What a recurrent mixer adds to the residual stream: out(y * silu(gate(x)))."""
    y_BTF = y_BTF.to(x_BTD.dtype)
    mixed_BTD: Tensor = out(y_BTF if gate is None else gated(gate(x_BTD), y_BTF))
    return mixed_BTD
