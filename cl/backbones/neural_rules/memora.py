"""Memora: weights on a simplex, kept near the last ones by a relative entropy."""

from __future__ import annotations

import torch

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._general import Recipe
from cl.backbones.neural_rules._rule import NeuralRule, require_above


class Memora(NeuralRule):
    """W_t = c softmax(alpha_t log W_{t-1} - eta_t grad 1/2 |M(k_t) - v_t|^2), over the inputs of each unit.

    Kept as A = log W up to a constant, so that A_t = alpha_t A_{t-1} - eta_t grad. Memory: two layers behind LayerNorm
    and a residual. Loss: squared error. Retention: relative entropy. Step: mirror descent.

    Args:
        mass: c, the sum of the weights into a unit.

    Raises:
        UserError: a value outside its range.

    Source: in the spirit of Behrouz et al., 2025 (Miras: It's All Connected), equations (21) and (27) as readers' notes
        have them; there is no official code. Differences: softmax at every token, exact within a chunk but for the
        gradient, which is the chunk start's; there softmax and log at the first token of a chunk, and between them W is
        added to as it is.
    """

    row = Row(
        "layers W on simplices",
        "1/2 |M(k) - v|^2",
        "relative entropy to W",
        "c softmax(alpha log W - eta grad)",
        "M(q; W)",
        "W of the chunk start",
        "Behrouz et al., 2025",
    )
    is_normed = has_decay = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        chunk: int = 16,
        mass: float = 1.0,
        depth: int = 2,
        expansion: int = 4,
        max_step: float = 1.0,
    ) -> None:
        require_above(self.name, "mass", mass, 0)
        self.recipe = Recipe(retention="simplex", option=float(mass))  # type: ignore[misc]
        super().__init__(width, num_heads, head_width, chunk=chunk, depth=depth, expansion=expansion, max_step=max_step)
        with torch.no_grad():
            for w in self.start:
                # logarithms of weights: of order one, whatever the fan-in
                w.mul_(w.shape[-2] ** 0.5)
