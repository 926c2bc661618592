"""Lateral neurons that learn the directions of a layer's inputs, step by step, while the network is trained.

Shape legend: N rows of inputs, D inputs of a unit, R directions held, K new neurons, S = 2 K + N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies._subspace import WEAKEST, InputSubspace, joined

LARGEST_CHANGE, LARGEST_ACTIVITY = 10.0, 20.0
"""Bounds of the Hebbian rule, as in the official code: of an entry of a step, and of a spiking lateral neuron."""


class Lateral(InputSubspace):
    """Lateral connections that learn the principal directions by a Hebbian and anti-Hebbian rule (Oja's subspace rule).

        y = x H^T,  x_hat = y H,  m <- 0.9 m + 0.1 clamp(y^T (x - x_hat) / N),  H <- H + rate m

    H are the rows learnt in earlier experiences, which stay, and new ones, which learn what those leave over.

    Args:
        rate: of a step (paper's eta).
        inner_steps: steps for each batch of inputs.
        orthonormal: directions are made orthonormal when an experience ends; otherwise H^T H is projected out as it is.
        spiking_levels: activities of lateral neurons are rounded to so many levels on each side of 0, the last of
            them 20; None rounds nothing.
    """

    def __init__(self, rate: float, inner_steps: int, orthonormal: bool, spiking_levels: int | None = None) -> None:
        super().__init__()
        self.rate, self.inner_steps, self.orthonormal = rate, inner_steps, orthonormal
        self.spiking_levels = spiking_levels
        self._forget_new()

    def _forget_new(self) -> None:
        """No neurons but those of experiences that have ended."""
        self.rows = self.momentum = torch.empty(0, 0)
        self._buffers: tuple[Tensor, ...] = ()

    def begin_task(self, num_neurons: int, width: int, like: Tensor, generator: torch.Generator) -> None:
        """Add neurons with orthonormal random connections, as many as there are directions left at most."""
        num_neurons = min(num_neurons, width - self.rank)
        self._forget_new()
        if num_neurons > 0:
            drawn = torch.randn(width, num_neurons, generator=generator, dtype=torch.float64)
            self.rows = torch.linalg.qr(drawn).Q.T.to(like).contiguous()
            self.momentum = torch.zeros_like(self.rows)

    def update(self, rows_ND: Tensor, outside_ND: Tensor | None = None) -> None:
        if not len(self.rows):
            return
        if outside_ND is None:
            outside_ND = rows_ND
            if self.rank:
                outside_ND = rows_ND - (rows_ND @ self.basis * self.strength) @ self.basis.T
        if not self._update_in_coefficients(rows_ND, outside_ND):
            self._update(rows_ND, outside_ND)

    def _update(self, rows_ND: Tensor, outside_ND: Tensor) -> None:
        """As the rule is written."""
        for _ in range(self.inner_steps):
            activity_NK = self._fired(rows_ND @ self.rows.T)
            if self.rows.shape[0] < len(rows_ND):
                # the same product, the small one first
                heard_KD = activity_NK.T @ outside_ND
                change = torch.addmm(heard_KD, activity_NK.T @ activity_NK, self.rows, alpha=-1)
            else:
                change = activity_NK.T @ torch.addmm(outside_ND, activity_NK, self.rows, alpha=-1)
            change.div_(len(rows_ND)).clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)
            self.momentum.mul_(0.9).add_(change, alpha=0.1)
            self.rows.add_(self.momentum, alpha=self.rate)

    def _update_in_coefficients(self, rows_ND: Tensor, outside_ND: Tensor) -> bool:
        """The same where no change reaches its bound: all inner steps stay in the span of H, m and what H leaves over.

            left = x_outside - x H^T H,   [H; m] <- C [H; m; left]      C (2K, 2K + N), stepped without products over D

        Returns:
            whether it was done; not where the bound could be reached, or where it is no less work.
        """
        num, count = len(rows_ND), len(self.rows)
        span = 2 * count + num
        as_written = self.inner_steps * 2 * count * (2 * num + count)
        if self.spiking_levels is not None or as_written < 2 * count * (num + span) + num * num:
            return False
        all_SD = self._span_of(num)
        held_SD, left_ND = all_SD[: 2 * count], all_SD[2 * count :]
        by_held_NS = rows_ND @ held_SD.T
        first_NK = by_held_NS[:, :count]
        torch.addmm(outside_ND, first_NK, self.rows, alpha=-1, out=left_ND)
        seen_NS = torch.cat([by_held_NS, rows_ND @ left_ND.T], dim=1)
        unit_SS = torch.eye(span, dtype=seen_NS.dtype, device=seen_NS.device)
        rows_KS, momentum_KS, outside_NS = unit_SS.split([count, count, num])
        outside_NS[:, :count] = first_NK
        changes = []
        for _ in range(self.inner_steps):
            activity_NK = seen_NS @ rows_KS.T
            changes.append(activity_NK.T @ torch.addmm(outside_NS, activity_NK, rows_KS, alpha=-1))
            momentum_KS.mul_(0.9).add_(changes[-1], alpha=0.1 / num)
            rows_KS.add_(momentum_KS, alpha=self.rate)
        # Cauchy-Schwarz for each of the three parts of an entry: rows of coefficients, columns of the span
        _, following_SD = self._buffers
        squares = torch.stack(changes).square(), torch.square(all_SD, out=following_SD)
        parts = zip(squares[0].split([count, count, num], 2), squares[1].split([count, count, num]), strict=True)
        largest = sum((rows.sum(2).max() * columns.sum(0).max()).sqrt() for rows, columns in parts)
        if largest >= LARGEST_CHANGE * num:
            return False
        torch.mm(unit_SS[: 2 * count], all_SD, out=following_SD[: 2 * count])
        self.rows, self.momentum = following_SD[: 2 * count].split(count)
        self._buffers = (following_SD, all_SD)
        return True

    def _span_of(self, num: int) -> Tensor:
        """(2K + N, D) H, m, which are views of it from now on, and room for N rows: a step allocates nothing wide."""
        count, width = self.rows.shape
        front_SD = self._buffers[0] if self._buffers else self.rows
        if len(front_SD) != 2 * count + num or front_SD.data_ptr() != self.rows.data_ptr():
            # one allocation each: both are aligned, and a resumed run, whose turn may be the other one, rounds alike
            front_SD, back_SD = (self.rows.new_empty(2 * count + num, width) for _ in range(2))
            torch.cat([self.rows, self.momentum], out=front_SD[: 2 * count])
            self.rows, self.momentum = front_SD[: 2 * count].split(count)
            self._buffers = (front_SD, back_SD)
        return front_SD

    def _fired(self, activity: Tensor) -> Tensor:
        if self.spiking_levels is None:
            return activity
        step = LARGEST_ACTIVITY / self.spiking_levels
        return activity.clamp(-LARGEST_ACTIVITY, LARGEST_ACTIVITY).div(step).round().mul(step)

    @property
    def connections(self) -> Tensor:
        """(K, D) all rows of H; those of earlier experiences up to a rotation, which changes no projection."""
        held = (self.basis * self.strength.sqrt()).T
        return torch.cat([each for each in (held, self.rows) if len(each)])

    def measures(self) -> dict[str, float]:
        """`orthonormality`: largest entry of |H H^T - I|; 0 is perfect."""
        if self.rank == 0 and not len(self.rows):
            return {}
        gram = self.connections @ self.connections.T
        return {"orthonormality": float((gram - torch.eye(len(gram)).to(gram)).abs().max())}

    def end_task(self) -> None:
        if not self.momentum.any():
            # connections as they were drawn are of nothing that was read
            self._forget_new()
            return
        dtype = self.rows.dtype
        if self.orthonormal:
            self.basis = joined(self.basis, self.rows.T).to(dtype)
            self.strength = self.basis.new_ones(self.rank)
        else:
            _, values, vectors = torch.linalg.svd(self.connections.double(), full_matrices=False)
            is_held = values.square() > WEAKEST
            self.basis, self.strength = vectors[is_held].T.to(dtype), values[is_held].square().to(dtype)
        self._forget_new()
