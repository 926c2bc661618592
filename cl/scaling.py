"""Loss scaling: what float16 is too coarse for is multiplied on the way back, and read in its own size by everybody."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

SMALLEST_SCALE = 1e-4
"""Below it gradients overflow that no training survives: something else is wrong."""


class LossScaler(torch.amp.GradScaler):
    """torch's dynamic loss scaling, for a loop whose hooks look at gradients; not enabled it changes nothing."""

    def unscale(self, optimizer: Optimizer) -> bool:
        """Bring the gradients to their own size; False where one overflowed, in this process or in another."""
        if not self.is_enabled():
            return True
        self.unscale_(optimizer)
        return not any(found.item() for found in self._found_inf_per_device(optimizer).values())

    def gradients(self, loss: Tensor, tensors: Iterable[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of a loss by some tensors, in float32 at least; None where one has no part in it.

        Where the scale of the run is too large for this loss, a smaller one is taken.

        Raises:
            FloatingPointError: they are not finite at any scale.
        """
        tensors = list(tensors)
        if not self.is_enabled():
            return torch.autograd.grad(loss, tensors, allow_unused=True)
        scale: float = self.get_scale()
        while scale >= SMALLEST_SCALE:
            scaled = torch.autograd.grad(loss.float() * scale, tensors, allow_unused=True, retain_graph=True)
            found = [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in scaled]
            if all(g is None or bool(g.isfinite().all()) for g in found):
                return found
            scale *= self.get_backoff_factor()
        raise FloatingPointError(
            f"the gradients of a loss of {float(loss.detach()):g} are not finite at any loss scale"
        )
