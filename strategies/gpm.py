"""Gradient projection memory: updates leave out the principal directions of what old experiences read.

    end of an experience:  M <- [M, leading directions of X - X M M^T]   until they carry `thresholds` of |X|^2
    every step:            change <- change - (change M) M^T             in every linear and convolutional layer

Source: Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021 (sahagobinda/GPM
main_pmnist.py).
Differences: the whole change of the weights is projected, not the gradient alone, so that momentum, Adam and weight
decay cannot move old responses either (with plain SGD the two are the same). Biases are weights of a constant input;
the official networks have none. The first experience reaches the threshold too, where the official rule stops one
direction short. The official code raises thresholds by experience on CIFAR; here they stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require, require_count, require_number
from strategies._per_layer import for_layer, listed
from strategies._projection import Projection
from strategies._subspace import Principal


class Gpm(Projection[Principal]):
    """Hold the weights in the principal subspace of the inputs of every experience.

    Args:
        thresholds: share of an experience's energy that the directions held must carry; one number, or one for each
            layer from the first, the last serving all others. 0 holds nothing.
        num_rows: rows of an experience that the directions are taken from.
        others: what becomes of trained layers of other types: "refuse", "freeze" them after the first experience, or
            "train" them without protection.

    Raises:
        UserError: a value outside its range, or a layer that it cannot protect.

    Cost: no rows per step; with R directions, 2 * D * R multiply-adds a row for a linear layer of O * D weights under
    SGD without weight decay, 4 * D * R + 2 * O * R under other optimizers, and 2 * O * D * R a step for a convolution;
    num_rows rows forward and one eigendecomposition of D * D per layer when an experience ends.
    """

    contract = Contract(toy={"thresholds": 0.9, "num_rows": 100}, zero={"thresholds": 0.0}, forgets_less_by=0.1)

    def __init__(
        self, thresholds: float | Sequence[float] = (0.95, 0.99), num_rows: int = 300, others: str = "refuse"
    ) -> None:
        super().__init__(others)
        for threshold in listed(thresholds):
            require_number("gpm.thresholds", threshold)
            require(threshold <= 1, "gpm.thresholds", threshold, "at most 1")
        require(bool(listed(thresholds)), "gpm.thresholds", thresholds, "a number, or a list of at least one")
        require_count("gpm.num_rows", num_rows)
        self.thresholds, self.num_rows = thresholds, num_rows

    def new_subspace(self, number: int) -> Principal:
        return Principal(for_layer(self.thresholds, number))

    def rows_at_end(self, state: TrainState) -> Iterator[Tensor]:
        if not any(listed(self.thresholds)):
            return iter(())
        return self.drawn(state, self.num_rows)
