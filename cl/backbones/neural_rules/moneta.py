"""Moneta: an l_p loss, and weights kept small by an l_q norm."""

from __future__ import annotations

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._general import Recipe
from cl.backbones.neural_rules._rule import NeuralRule, require_above
from cl.core import UserError


class Moneta(NeuralRule):
    """A_t = alpha_t A_{t-1} - eta_t grad 1/p |M(k_t) - v_t|_p^p,  W_t = A_t / |A_t|_q^(q - 2).

    Memory: two layers behind LayerNorm and a residual. Loss: l_p. Retention: decay of the accumulator, l_q norm of the
    weights. Step: gradient.

    Args:
        p: of the loss, above 1.
        q: of the norm, at least 2, where 2 leaves the weights as they are.

    Raises:
        UserError: a value outside its range.

    Source: in the spirit of Behrouz et al., 2025 (Miras: It's All Connected), equations (24) and (25) as readers' notes
        have them, with its p = 3 and q = 4; there is no official code. Differences: the loss is divided by p; alpha and
        eta are one number a head and token, there one a channel; the norm is taken at every token, not at chunk ends;
        each matrix has its own norm.
    """

    row = Row(
        "layers W",
        "1/p |M(k) - v|_p^p",
        "alpha A, |W|_q kept small",
        "W = A / |A|_q^(q - 2), A = alpha A - eta grad",
        "M(q; W)",
        "A of the chunk start",
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
        p: float = 3.0,
        q: float = 4.0,
        depth: int = 2,
        expansion: int = 4,
        max_step: float = 0.1,
    ) -> None:
        require_above(self.name, "p", p, 1)
        if isinstance(q, bool) or not isinstance(q, int | float) or not 2 <= q < float("inf"):
            raise UserError(f"q of the rule moneta is {q!r}; it must be a number of at least 2")
        self.recipe = Recipe(loss="lp", retention="normalised", option=float(q))  # type: ignore[misc]
        self.threshold = float(p)  # type: ignore[misc]
        super().__init__(width, num_heads, head_width, chunk=chunk, depth=depth, expansion=expansion, max_step=max_step)
