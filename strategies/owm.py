"""Orthogonal weights modification: updates leave out, softly, every direction that the batches of old experiences had.

    change <- change P,   P = I - A (A^T A + alpha I)^{-1} A^T     columns of A: mean inputs of all batches so far

Source: Zeng, Chen, Cui & Yu, "Continual learning of context-dependent processing in neural networks", Nature Machine
Intelligence 2019 (beijixiong3510/OWM).
Differences: the recursive least squares of the paper are solved in one go when an experience ends, from the sum of the
outer products of the mean inputs; with a constant alpha that is the same matrix. Means are taken over batches of rows
seen with the weights at the end of the experience, as in the paper; the official code takes them on the way, and lets
alpha fall. Directions held by less than 1e-4 are left out. The whole change of the weights is projected, as in `gpm`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require_count, require_number
from strategies._projection import Projection
from strategies._subspace import Damped


class Owm(Projection[Damped]):
    """Hold the weights in the directions of the mean inputs of batches, each as firmly as it was seen often.

    Args:
        alpha: sum of squares at which a direction is held by half.
        num_rows: rows of an experience that means are taken from; None takes all of them.
        rows_per_mean: rows of a batch.
        others: what becomes of trained layers of other types: "refuse", "freeze" them after the first experience, or
            "train" them without protection.

    Raises:
        UserError: a value outside its range, or a layer that it cannot protect.

    Cost: as `gpm` under other optimizers, where R is at most the number of batches; num_rows rows forward when an
    experience ends; D * D numbers kept for each layer.
    """

    contract = Contract(
        toy={"rows_per_mean": 4, "alpha": 0.1},
        why_not_zero="a projection has no strength; alpha only damps it",
        forgets_less_by=0.1,
    )

    def __init__(
        self, alpha: float = 1e-3, num_rows: int | None = None, rows_per_mean: int = 64, others: str = "refuse"
    ) -> None:
        super().__init__(others)
        require_number("owm.alpha", alpha, above=0.0)
        require_count("owm.num_rows", num_rows, none_means="all rows")
        require_count("owm.rows_per_mean", rows_per_mean)
        self.alpha, self.num_rows, self.rows_per_mean = alpha, num_rows, rows_per_mean

    def new_subspace(self, number: int) -> Damped:
        return Damped(self.alpha)

    def rows_at_end(self, state: TrainState) -> Iterator[Tensor]:
        return self.drawn(state, self.num_rows, self.rows_per_mean)
