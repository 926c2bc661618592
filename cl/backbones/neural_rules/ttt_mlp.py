"""TTT-MLP: two layers behind a norm and a residual, trained by plain gradient steps."""

from __future__ import annotations

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._rule import NeuralRule


class TttMlp(NeuralRule):
    """W_t = W_{t-1} - eta_t grad 1/2 |M(k_t) - v_t|^2,  M(x) = x + LayerNorm(gelu(x W_1) W_2).

    Memory: two layers behind LayerNorm and a residual. Loss: squared error. Retention: all. Step: gradient.

    Source and differences: as ttt_linear.
    """

    row = Row(
        "layers W",
        "1/2 |M(k) - v|^2, M(x) = x + norm(gelu(x W1) W2)",
        "W",
        "W - eta grad",
        "M(q; W)",
        "W of the chunk start",
        "Sun et al., 2024",
    )
    is_normed = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        chunk: int = 16,
        expansion: int = 4,
        max_step: float = 1.0,
    ) -> None:
        super().__init__(width, num_heads, head_width, chunk=chunk, depth=2, expansion=expansion, max_step=max_step)
