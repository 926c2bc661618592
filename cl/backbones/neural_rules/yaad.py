"""Yaad: a loss that does not follow outliers."""

from __future__ import annotations

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._general import Recipe
from cl.backbones.neural_rules._rule import NeuralRule


class Yaad(NeuralRule):
    """W_t = alpha_t W_{t-1} - eta_t grad 1/2 |e_t|^2 where |e_t| <= delta_t, else - eta_t delta_t grad |e_t|_1.

    e_t = M(k_t) - v_t, delta_t a softplus of the token. Memory: two layers behind LayerNorm and a residual. Loss:
    Huber, switched by the error's length. Retention: decay (local and global l_2). Step: gradient.

    Source: in the spirit of Behrouz et al., 2025 (Miras: It's All Connected), equation (26) as readers' notes have it;
        there is no official code. Differences: alpha, eta and delta are one number a head and token, there one a
        channel.
    """

    row = Row(
        "layers W",
        "Huber of M(k) - v, threshold delta",
        "alpha W",
        "alpha W - eta grad",
        "M(q; W)",
        "W of the chunk start",
        "Behrouz et al., 2025",
    )
    recipe = Recipe(loss="switched")
    is_normed = has_decay = has_threshold = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        chunk: int = 16,
        depth: int = 2,
        expansion: int = 4,
        max_step: float = 1.0,
    ) -> None:
        super().__init__(width, num_heads, head_width, chunk=chunk, depth=depth, expansion=expansion, max_step=max_step)
