"""Directions of a layer's inputs in which its weights are held: three ways to find them, one way to project.

    project(change) = change - (change U) diag(s) U^T         U orthonormal, s the strength of each direction

Shape legend: N rows of inputs, D inputs of a unit, O units of the layer, R directions held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WEAKEST = 1e-4
"""Directions that would be held by less than this are left out."""
LARGEST_CHANGE, LARGEST_ACTIVITY = 10.0, 20.0
"""Bounds of the Hebbian rule, as in the official code: of an entry of a step, and of a spiking lateral neuron."""


class InputSubspace:
    """What a layer has read in the experiences so far; subclasses say how it is found.

    Attributes:
        basis: U (D, R), orthonormal columns; None before the first experience has ended.
        strength: s (R,); 1 holds a direction exactly.
    """

    def __init__(self) -> None:
        self.basis: Tensor | None = None
        self.strength: Tensor | None = None

    def update(self, rows_ND: Tensor) -> None:
        """Look at inputs of the running experience."""
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

    def hold(self, layer: Any, response_OR: Tensor) -> Tensor:
        """Take out of the weights what they changed along the directions held since they gave this response.

        The same as adding the projected change to the weights as they were, without a copy of these, and without
        rounding errors that add up over steps.

        Returns:
            the response that the layer gives now.
        """
        now = self.response(layer)
        excess = (now - response_OR).mul_(self.strength)
        inputs = self.basis if layer.bias is None else self.basis[:-1]
        with torch.no_grad():
            layer.weight.view(len(layer.weight), -1).addmm_(excess, inputs.T, alpha=-1)
            if layer.bias is not None:
                layer.bias.addmv_(excess, self.basis[-1], alpha=-1)
        return now.sub_(excess)

    @property
    def rank(self) -> int:
        return 0 if self.basis is None else self.basis.shape[1]

    @property
    def is_full(self) -> bool:
        """No direction is left in which the weights could move."""
        return self.basis is not None and self.rank == self.basis.shape[0]

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

    def update(self, rows_ND: Tensor) -> None:
        self.moment, self.dtype = _added(self.moment, rows_ND), rows_ND.dtype

    def end_task(self) -> None:
        moment, self.moment = self.moment, None
        if moment is None or self.threshold == 0:
            return
        held, total = self.basis, moment.trace()
        explained = total.new_zeros(())
        if held is not None:
            held = held.double()
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

    def update(self, rows_ND: Tensor) -> None:
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
        return self.strength is not None and self.basis.shape[0] == int((self.strength > 0.5).sum())


class Lateral(InputSubspace):
    """Lateral connections that learn the principal directions by a Hebbian and anti-Hebbian rule (Oja's subspace rule).

        y = x H^T,  x_hat = y H,  m <- 0.9 m + 0.1 clamp(y^T (x - x_hat) / N),  H <- H + rate m

    H are the rows learnt in earlier experiences, which stay, and new ones, which learn what those leave over.

    Args:
        rate: of a step (paper's eta).
        inner_steps: steps for each batch of inputs.
        orthonormal: directions are made orthonormal when an experience ends; otherwise H^T H is projected out as it is.
        spiking_levels: activities of lateral neurons are rounded to so many levels between -20 and 20; None rounds
            nothing.
    """

    def __init__(self, rate: float, inner_steps: int, orthonormal: bool, spiking_levels: int | None = None) -> None:
        super().__init__()
        self.rate, self.inner_steps, self.orthonormal = rate, inner_steps, orthonormal
        self.spiking_levels = spiking_levels
        self.rows: Tensor | None = None
        self.momentum: Tensor | None = None

    def begin_task(self, num_neurons: int, width: int, like: Tensor, generator: torch.Generator) -> None:
        """Add neurons with orthonormal random connections, as many as there are directions left at most."""
        num_neurons = min(num_neurons, width - self.rank)
        self.rows = self.momentum = None
        if num_neurons > 0:
            drawn = torch.randn(width, num_neurons, generator=generator, dtype=torch.float64)
            self.rows = torch.linalg.qr(drawn).Q.T.to(like).contiguous()
            self.momentum = torch.zeros_like(self.rows)

    def update(self, rows_ND: Tensor) -> None:
        if self.rows is None:
            return
        left_ND = rows_ND if self.rank == 0 else rows_ND - (rows_ND @ self.basis * self.strength) @ self.basis.T
        for _ in range(self.inner_steps):
            activity_NK = self._fired(rows_ND @ self.rows.T)
            if self.rows.shape[0] < len(rows_ND):
                # the same product, the small one first
                heard_KD = activity_NK.T @ left_ND
                change = torch.addmm(heard_KD, activity_NK.T @ activity_NK, self.rows, alpha=-1)
            else:
                change = activity_NK.T @ torch.addmm(left_ND, activity_NK, self.rows, alpha=-1)
            change.div_(len(rows_ND)).clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)
            self.momentum.mul_(0.9).add_(change, alpha=0.1)
            self.rows.add_(self.momentum, alpha=self.rate)

    def _fired(self, activity: Tensor) -> Tensor:
        if self.spiking_levels is None:
            return activity
        step = LARGEST_ACTIVITY / self.spiking_levels
        return activity.clamp(-LARGEST_ACTIVITY, LARGEST_ACTIVITY).div(step).round().mul(step)

    @property
    def connections(self) -> Tensor:
        """(K, D) all rows of H; those of earlier experiences up to a rotation, which changes no projection."""
        held = [] if self.rank == 0 else [(self.basis * self.strength.sqrt()).T]
        return torch.cat([*held, *([] if self.rows is None else [self.rows])])

    def measures(self) -> dict[str, float]:
        """`orthonormality`: largest entry of |H H^T - I|; 0 is perfect."""
        if self.rank == 0 and self.rows is None:
            return {}
        gram = self.connections @ self.connections.T
        return {"orthonormality": float((gram - torch.eye(len(gram)).to(gram)).abs().max())}

    def end_task(self) -> None:
        if self.rows is None:
            return
        dtype = self.rows.dtype
        if self.orthonormal:
            self.basis = joined(self.basis, self.rows.T).to(dtype)
            self.strength = self.basis.new_ones(self.rank)
        else:
            _, values, vectors = torch.linalg.svd(self.connections.double(), full_matrices=False)
            is_held = values.square() > WEAKEST
            self.basis, self.strength = vectors[is_held].T.to(dtype), values[is_held].square().to(dtype)
        self.rows = self.momentum = None


def joined(held_DR: Tensor | None, more_DK: Tensor) -> Tensor:
    """An orthonormal basis, in float64, of what two sets of directions span; the first set stays as it is."""
    more_DK = more_DK.double()
    if held_DR is None:
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
