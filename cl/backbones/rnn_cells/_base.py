"""A cell whose next state is a nonlinear function of the last one: what it must say about itself.

Shape legend: B rows, T tokens, D width of the mixer, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RnnCell(nn.Module):
    """h_t = f(h_{t-1}, x_t). Subclasses define `drive` and `advance`; those with a kernel also `run`.

    Attributes:
        state_shape: of one row's state, as the kernels keep it.
    """

    state_shape: tuple[int, ...]

    def drive(self, x: Tensor) -> Tensor:
        """What a token contributes whatever the state is; of one token (B, ...) or of all (B, T, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define drive")

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, F) and the state after one token, as the source writes it."""
        raise NotImplementedError

    def start(self, zeros: Tensor) -> Tensor:
        """The state at the start of a document, from zeros of its shape."""
        return zeros

    def run(self, driven_BT: Tensor, h0: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """All features and the last state, the fast way."""
        return self.walk(driven_BT, h0, reset_BT)

    def walk(self, driven_BT: Tensor, h: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token after token."""
        begin, features = self.start(torch.zeros_like(h)), []
        # unbind, not indexing: the gradient of x[:, t] is a full tensor of zeros per step
        for t, driven_B in enumerate(driven_BT.unbind(1)):
            if reset_BT is not None:
                h = torch.where(reset_BT[:, t].view(-1, *[1] * (h.dim() - 1)), begin, h)
            y_BF, h = self.advance(driven_B, h)
            features.append(y_BF)
        return torch.stack(features, 1), h
