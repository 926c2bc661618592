"""TTT-Linear: a matrix behind a norm and a residual, trained by plain gradient steps."""

from __future__ import annotations

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._rule import NeuralRule


class TttLinear(NeuralRule):
    """W_t = W_{t-1} - eta_t grad 1/2 |M(k_t) - v_t|^2,  M(x) = x + LayerNorm(x W).

    Memory: a matrix behind LayerNorm and a residual. Loss: squared error. Retention: all. Step: gradient.

    Source: in the spirit of Sun et al., 2024 (Learning to (Learn at Test Time)). Differences: no bias inside; a step
        size per token without the source's average over the chunk; keys and queries of length 1.
    """

    row = Row(
        "W",
        "1/2 |M(k) - v|^2, M(x) = x + norm(x W)",
        "W",
        "W - eta grad",
        "M(q; W)",
        "W of the chunk start",
        "Sun et al., 2024",
    )
    is_normed = True

    def __init__(self, width: int, num_heads: int, head_width: int, *, chunk: int = 16, max_step: float = 1.0) -> None:
        super().__init__(width, num_heads, head_width, chunk=chunk, max_step=max_step)
