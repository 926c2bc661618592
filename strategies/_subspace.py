"""Directions of a layer's inputs in which its weights are held: two ways to find them, one way to project.

    project(change) = change - (change U) diag(s) U^T         U orthonormal, s the strength of each direction

A third way is in `_lateral`.

Shape legend: N rows of inputs, D inputs of a unit, O units of the layer, R directions held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WEAKEST = 1e-4
"""Directions that would be held by less than this are left out."""


class InputSubspace:
    """What a layer has read in the experiences so far; subclasses say how it is found.

    Attributes:
        basis: U (D, R), orthonormal columns; (0, 0) before the first experience has ended.
        strength: s (R,); 1 holds a direction exactly.
    """

    def __init__(self) -> None:
        self.basis, self.strength = torch.empty(0, 0), torch.empty(0)

    def update(self, rows_ND: Tensor, outside_ND: Tensor | None = None) -> None:
        """Look at inputs of the running experience.

        Args:
            outside_ND: their part outside the directions held, where it is at hand.
        """
        raise NotImplementedError

    def end_task(self) -> None:
        """The experience is over: what was seen of it is held from now on."""
        raise NotImplementedError

    def project(self, change_OD: Tensor) -> Tensor:
        """A change of the weights without its part along the directions held.

        Example:
            >>> one = Principal(1.0)
            >>> one.update(torch.tensor([[2.0, 0.0]]))
            >>> one.end_task()
            >>> one.project(torch.ones(1, 2)).abs().tolist()
            [[0.0, 1.0]]
        """
        if self.rank == 0:
            return change_OD
        return change_OD - ((change_OD @ self.basis) * self.strength) @ self.basis.T

    def response(self, layer: Any) -> Tensor:
        """(O, R) what the layer says to each direction."""
        weight = layer.weight.detach().flatten(1)
        if layer.bias is None:
            return weight @ self.basis
        return torch.addmm(torch.outer(layer.bias.detach(), self.basis[-1]), weight, self.basis[:-1])

    def hold(self, layer: Any, response_OR: Tensor, now_OR: Tensor | None = None) -> Tensor:
        """Take out of the weights what they changed along the directions held since they gave this response.

        The same as adding the projected change to the weights as they were, without a copy of these, and without
        rounding errors that add up over steps.

        Args:
            now_OR: the response that it gives before that, where it is at hand.

        Returns:
            the response that the layer gives now.
        """
        now = self.response(layer) if now_OR is None else now_OR
        excess = (now - response_OR).mul_(self.strength)
        inputs = self.basis if layer.bias is None else self.basis[:-1]
        with torch.no_grad():
            layer.weight.view(len(layer.weight), -1).addmm_(excess, inputs.T, alpha=-1)
            if layer.bias is not None:
                layer.bias.addmv_(excess, self.basis[-1], alpha=-1)
        return now.sub_(excess)

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def is_exact(self) -> bool:
        """Whether every direction is held fully, so that projecting twice is projecting once."""
        return bool((self.strength == 1).all())

    @property
    def is_full(self) -> bool:
        """No direction is left in which the weights could move."""
        return self.rank > 0 and self.rank == len(self.basis)

    def captured(self, rows_ND: Tensor) -> float:
        """Share of the energy of inputs that lies in the directions held."""
        if self.rank == 0:
            return 0.0
        return float((rows_ND @ self.basis).square().sum() / rows_ND.square().sum())

    def measures(self) -> dict[str, float]:
        """Scalars worth a curve, beside the rank and the captured variance."""
        return {}

    def to(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        for name, value in saved.items():
            setattr(self, name, value.clone())


class Principal(InputSubspace):
    """Principal directions of the inputs of every experience (gradient projection memory).

    Directions are added, the largest first, until those held carry the share `threshold` of the experience's energy.
    Only the second moment of the inputs is kept while they are seen; eigenvectors of it are the singular vectors.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.moment: Tensor | None = None
        self.dtype = torch.float32

    def update(self, rows_ND: Tensor, outside_ND: Tensor | None = None) -> None:
        self.moment, self.dtype = _added(self.moment, rows_ND), rows_ND.dtype

    def end_task(self) -> None:
        moment, self.moment = self.moment, None
        if moment is None or self.threshold == 0:
            return
        held, total = self.basis.double(), moment.trace()
        explained = total.new_zeros(())
        if len(held):
            explained = ((moment @ held) * held).sum()
            moment = _outside(_outside(moment, held).T, held)
        values, vectors = _eigen(moment)
        reached = explained + values.flip(0).clamp(min=0.0).cumsum(0)
        # rounding must not ask for directions that carry nothing
        missing = int((reached < min(self.threshold, 1 - 1e-12) * total).sum()) + 1
        if explained >= self.threshold * total:
            missing = 0
        missing = min(missing, len(moment) - self.rank)
        self.basis = joined(held, vectors.flip(1)[:, :missing]).to(self.dtype)
        self.strength = self.basis.new_ones(self.rank)


class Damped(InputSubspace):
    """All directions of the mean inputs of batches, each held by how much was seen of it (orthogonal weights).

        P = I - A (A^T A + alpha I)^{-1} A^T        columns of A: mean inputs of batches

    With the eigenvalues l of A A^T, which recursive least squares invert step by step, s = l / (l + alpha).
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.moment: Tensor | None = None
        self.dtype = torch.float32

    def update(self, rows_ND: Tensor, outside_ND: Tensor | None = None) -> None:
        """Look at the inputs of one batch."""
        self.moment, self.dtype = _added(self.moment, rows_ND.mean(0, keepdim=True)), rows_ND.dtype

    def end_task(self) -> None:
        if self.moment is None:
            return
        values, vectors = _eigen(self.moment)
        strength = values.clamp(min=0.0) / (values.clamp(min=0.0) + self.alpha)
        is_held = strength > WEAKEST
        self.basis, self.strength = vectors[:, is_held].to(self.dtype), strength[is_held].to(self.dtype)

    @property
    def is_full(self) -> bool:
        """No direction is left in which a change would keep half of its length."""
        return self.rank > 0 and len(self.basis) == int((self.strength > 0.5).sum())


def joined(held_DR: Tensor, more_DK: Tensor) -> Tensor:
    """An orthonormal basis, in float64, of what two sets of directions span; the first set stays as it is."""
    more_DK = more_DK.double()
    if not len(held_DR):
        return _independent(more_DK)
    held_DR = held_DR.double()
    # twice, since once leaves what rounding put there
    new = _independent(_outside(more_DK.T, held_DR).T)
    new = torch.linalg.qr(_outside(new.T, held_DR).T).Q
    return torch.cat([held_DR, new], dim=1)


def _independent(directions_DK: Tensor) -> Tensor:
    """Orthonormal columns with the same span, without directions that are lost in rounding."""
    if directions_DK.shape[1] == 0:
        return directions_DK
    left, values, _ = torch.linalg.svd(directions_DK, full_matrices=False)
    return left[:, values > 1e-6 * values.max().clamp(min=1e-300)]


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a second moment."""
    scale = moment.trace().clamp(min=1e-300)
    # rounding leaves it a little skew, which LAPACK may stumble over
    unit = (moment + moment.T) / (2 * scale)
    try:
        values, vectors = torch.linalg.eigh(unit)
    except torch.linalg.LinAlgError:
        # too many equal eigenvalues: tell them apart, far below what any threshold sees
        ramp = torch.linspace(0, 1e-10, len(unit), dtype=unit.dtype, device=unit.device)
        values, vectors = torch.linalg.eigh(unit + ramp.diag())
    return values * scale, vectors


def _outside(rows_ND: Tensor, basis_DR: Tensor) -> Tensor:
    """Rows without their part in the span of orthonormal columns."""
    return rows_ND - (rows_ND @ basis_DR) @ basis_DR.T


def _added(moment: Tensor | None, rows_ND: Tensor) -> Tensor:
    """A sum of outer products, and those of more rows, in float64."""
    rows_ND = rows_ND.double()
    return rows_ND.T @ rows_ND if moment is None else moment.addmm_(rows_ND.T, rows_ND)
