"""The one residual block: a mixer and an MLP, each behind a norm and added to what it read."""

from __future__ import annotations

from torch import Tensor, nn

from cl.backbones._norm import RMSNorm
from cl.backbones._state import State

Auxiliary = dict[str, Tensor]
"""Terms that a part adds to the loss, by name."""


class Block(nn.Module):
    """h = x + mixer(norm x);  y = h + mlp(norm h).

    Args:
        mixer: of `cl/backbones/mixers/`.
        mlp: of `cl/backbones/mlps/`; None leaves the second half out.
        dropout: of what each half adds, in training.
    """

    def __init__(self, width: int, mixer: nn.Module, mlp: nn.Module | None, dropout: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(width, eps=1e-6), mixer
        self.mlp_norm, self.mlp = None if mlp is None else RMSNorm(width, eps=1e-6), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        mode: str = "chunk",
        query_shift: Tensor | None = None,
    ) -> tuple[Tensor, State, Auxiliary]:
        # only attention has queries to shift, and only TRC2 shifts them
        shifted = {} if query_shift is None else {"query_shift": query_shift}
        mixed_BTD, left = self.mixer(self.mixer_norm(x_BTD), state, reset=reset, mode=mode, **shifted)
        auxiliary: Auxiliary = dict(left.pop("auxiliary", {}))
        x_BTD = x_BTD + self.dropout(mixed_BTD)
        if self.mlp is not None and self.mlp_norm is not None:
            y_BTD, terms = self.mlp(self.mlp_norm(x_BTD))
            x_BTD = x_BTD + self.dropout(y_BTD)
            auxiliary |= terms
        return x_BTD, left, auxiliary


def add_terms(total: Auxiliary, terms: Auxiliary) -> None:
    """Add the terms of one block to those of the blocks before it, name by name."""
    for name, term in terms.items():
        total[name] = total[name] + term if name in total else term
