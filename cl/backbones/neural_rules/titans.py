"""Titans' long-term memory: momentum of the surprise, and a decay."""

from __future__ import annotations

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._rule import NeuralRule


class Titans(NeuralRule):
    """P_t = eta_t P_{t-1} - theta_t grad 1/2 |M(k_t) - v_t|^2,  W_t = (1 - alpha_t) W_{t-1} + P_t,  o_t = M(q_t; W_t).

    Memory: layers of matrices with GELU between. Loss: squared error. Retention: decay. Step: gradient with momentum.

    Source: Behrouz et al., 2024 (Titans): equations (12) to (15), and (18) for gradients at the chunk's start with
        gates of each token, checked in the paper's text; there is no official code. Differences: half its loss; GELU
        and no biases inside; theta up to (1 - eta) max_step / chunk.
    """

    row = Row(
        "layers W",
        "1/2 |M(k) - v|^2",
        "alpha W",
        "alpha W + P, P = eta P - theta grad",
        "M(q; W)",
        "P, W of the chunk start",
        "Behrouz et al., 2024",
    )
    has_decay = has_momentum = True

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
