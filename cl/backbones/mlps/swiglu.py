"""The gated MLP of the Llama layout.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from cl.backbones._heads import require_width
from kernels.common.fused import gated


def hidden_width(width: int, hidden: int | None) -> int:
    """Hidden units: as given, or 8/3 of the width, rounded up to a multiple of 8, which costs what 4 D without a gate
    does."""
    if hidden is None:
        return -(-8 * width // 24) * 8
    require_width("mlp_width", hidden)
    return hidden


class Swiglu(nn.Module):
    """y = W_out (silu(W_gate x) * W_up x).

    Args:
        width: D.
        hidden: F; None takes 8/3 D, rounded up to a multiple of 8.

    Cost: 3 D F multiply-adds a token.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(self, width: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden_width(width, hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.out(gated(self.gate(x_BTD), self.up(x_BTD))), {}
