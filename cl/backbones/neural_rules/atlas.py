"""ATLAS: a loss over a window of tokens, polynomial features, and orthogonal steps."""

from __future__ import annotations

from dataclasses import replace

from cl.backbones.memory_rules._rule import Row
from cl.backbones.neural_rules._general import Recipe
from cl.backbones.neural_rules._rule import NeuralRule
from cl.core import UserError

STEPS = ("orthogonal", "gradient")


class Atlas(NeuralRule):
    """P_t = theta_t P_{t-1} - grad sum over the last `window` tokens i of omega_i 1/2 |M(phi(k_i)) - v_i|^2,
    W_t = alpha_t W_{t-1} + eta_t NewtonSchulz(P_t),  o_t = M(phi(q_t); W_t).

    Memory: layers of matrices over polynomial features. Loss: squared error over a window (the Omega rule). Retention:
    decay. Step: momentum, orthogonalised (Muon).

    Args:
        window: tokens in the loss.
        degree: of the features phi; 2 has all products of two entries, K (K + 3) / 2 of them.
        step: orthogonal, or gradient, which makes it the source's OmegaNet with momentum.

    Raises:
        UserError: a value outside its range.

    Source: Behrouz et al., 2025 (ATLAS: Learning to Optimally Memorize the Context at Test Time), from notes on the
        paper: in the spirit of it. Differences: omega_i is a sigmoid of token i alone; coefficients of the features are
        fixed; the gradient is taken at the chunk's start.
    """

    row = Row(
        "layers W over products phi(k)",
        "sum over a window of omega 1/2 |M(phi k) - v|^2",
        "alpha W",
        "alpha W + eta NewtonSchulz(P), P = theta P - grad",
        "M(phi q; W)",
        "P, W of the chunk start, tokens of the window",
        "Behrouz et al., 2025",
    )
    has_decay = has_momentum = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        chunk: int = 16,
        window: int = 4,
        degree: int = 2,
        depth: int = 1,
        expansion: int = 4,
        step: str = "orthogonal",
        max_step: float = 0.1,
    ) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise UserError(f"window of the rule atlas is {window!r}; it must be an integer of at least 1")
        if step not in STEPS:
            raise UserError(f"step of the rule atlas is {step!r}; it must be one of {', '.join(STEPS)}")
        self.recipe = replace(Recipe(), window=window, step=step)  # type: ignore[misc]
        super().__init__(
            width,
            num_heads,
            head_width,
            chunk=chunk,
            depth=depth,
            expansion=expansion,
            max_step=max_step,
            degree=degree,
        )
