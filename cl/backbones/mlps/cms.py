"""Continuum memory: a chain of MLPs that are meant to move at different paces, the first one most often.

    sequential    h_0 = x;  h_s = h_s-1 + mlp_s(norm h_s-1);  y = h_k - x
    independent   y = sum_s mlp_s(x)

The paces are the trainer's: `strategy=update_periods`, with a period for `*.levels.1.*`, a longer one for
`*.levels.2.*`, and so on. Without it this is a deeper MLP.

Shape legend: B rows, T tokens, D width, F hidden units of a level, k levels.
"""

from __future__ import annotations

from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones._norm import RMSNorm
from cl.backbones.mlps.swiglu import Swiglu, hidden_width
from cl.core import UserError

KINDS = ("sequential", "independent")


class Cms(nn.Module):
    """Levels of a continuum memory system.

    Args:
        width: D.
        hidden: F; None takes 8/3 D over the number of levels, rounded up to a multiple of 8, so that all of them cost
            what one `swiglu` does.
        levels: k.
        kind: sequential or independent.

    Raises:
        UserError: a value outside its range.

    Cost: 3 k D F multiply-adds a token.
    Source: Behrouz et al., "Nested Learning: The Illusion of Deep Learning Architectures", NeurIPS 2025 (Hope is
        self-modifying Titans, then this). Differences: each level of a chain is added to what it reads, behind a norm,
        since the chain stands inside a residual block; the nested variant is left out.
    """

    def __init__(self, width: int, *, hidden: int | None = None, levels: int = 3, kind: str = "sequential") -> None:
        super().__init__()
        require_width("mlp levels", levels)
        if kind not in KINDS:
            raise UserError(f"kind of cms is {kind!r}; it must be one of {', '.join(KINDS)}")
        if hidden is None:
            hidden = -(-hidden_width(width, None) // (8 * levels)) * 8
        self.kind = kind
        self.levels = nn.ModuleList(Swiglu(width, hidden=hidden) for _ in range(levels))
        # the block has normalised what the first level reads
        count = levels - 1 if kind == "sequential" else 0
        self.norms = nn.ModuleList(RMSNorm(width, eps=1e-6) for _ in range(count))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y_BTD = self.levels[0](x_BTD)[0]
        for number, level in enumerate(list(self.levels)[1:]):
            if self.kind == "sequential":
                y_BTD = y_BTD + level(self.norms[number](x_BTD + y_BTD))[0]
            else:
                y_BTD = y_BTD + level(x_BTD)[0]
        return y_BTD, {}
