"""Hebbian learning of the directions that old experiences read, projected out of all later updates (HLOP).

    every step, `inner_steps` times:  y = x H^T,   x_hat = y H
                                      m <- 0.9 m + 0.1 clamp(y^T (x - x_hat) / N, -10, 10),   H_new <- H_new + rate m
    every step:                       change <- change - change H_old^T H_old

y x^T is the Hebbian part, -y x_hat^T the anti-Hebbian feedback of lateral neurons: Oja's subspace rule. Old rows of H
take part in x_hat, so that new ones learn what is left over; rows are old when their experience has ended.

Source: Xiao, Meng, Zhang, He & Lin, "Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking
Neural Networks", ICLR 2024 (pkuxmq/HLOP-SNN modules/hlop_module.py).
Differences: the whole change of the weights is projected, where the official code projects the trace in the gradient;
with plain SGD the two are the same. Old rows are made orthonormal when their experience ends, so that old responses
cannot move at all; `orthonormal=False` takes H^T H as it is, as the official code does. By default a batch is learnt
from in one step of five times the published rate, not in five steps, which comes to the same for small rates but for a
longer memory of m. The rule runs after the step of the network, on what the layers read before it, and several inner
steps are taken in coefficients of H, m and the rows where that is less work. Biases are weights of a constant input;
the official networks have none. Layers of backbone snn are learnt on the traces of their synapses at every time step
(there: on firing rates).

Shape legend: N rows of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from cl.core import Batch
from cl.hooks import Contract
from cl.state import TrainState
from strategies._checks import require, require_count, require_number
from strategies._lateral import Lateral
from strategies._layer_inputs import Layers
from strategies._per_layer import for_layer, listed
from strategies._projection import ROWS_AT_A_TIME, Projection

Neurons = float | Sequence[float]


class Hebbian(Projection[Lateral]):
    """Hold the weights in a subspace that lateral neurons learn while the network is trained.

    Args:
        neurons: lateral neurons of each layer in the first experience: a count, or below 1 a share of its inputs; one
            number, or one for each layer from the first, the last serving all others.
        growth: the same for the neurons added in later experiences: one such value for all of them, or a list of lists,
            one for each experience from the second, the last serving all others.
        rates: step of the rule (paper's eta); a number, or one for each layer.
        inner_steps: steps for each batch; published are 5 with rates of 0.001 and 0.01, at more than twice the cost.
            Final accuracy on held-out training rows with one step of five times the rates, and with five: 93.73 ± 0.16
            and 93.73 ± 0.18 in `permuted_mnist_hlop`, 92.73 ± 0.15 and 92.74 ± 0.23 in `permuted_mnist_snn_hlop`
            (benchmarks/results/projection_overhead.md).
        orthonormal: make old rows orthonormal when their experience ends.
        spiking_levels: activities of lateral neurons are rounded to so many levels on each side of 0, the last of
            them 20; None does not.
        others: what becomes of trained layers of other types: "refuse", "freeze" them after the first experience, or
            "train" them without protection.

    Raises:
        UserError: a value outside its range, or a layer that it cannot protect.

    Cost: no rows in a step; for K new neurons and N rows at most D * K * (2 * N + K) multiply-adds a layer and inner
    step, and less where all inner steps together are cheaper in the span of what they combine; for old ones as `gpm`.
    256 rows forward when an experience ends, for the captured variance.
    """

    listens = True
    contract = Contract(
        toy={"neurons": 0.15, "growth": 0.12, "rates": 0.25}, zero={"neurons": 0, "growth": 0}, forgets_less_by=0.1
    )

    def __init__(
        self,
        neurons: Neurons = (0.1, 0.25),
        growth: Neurons | Sequence[Sequence[float]] = (0.08, 0.08),
        rates: float | Sequence[float] = (0.005, 0.05),
        inner_steps: int = 1,
        orthonormal: bool = True,
        spiking_levels: int | None = None,
        others: str = "refuse",
    ) -> None:
        super().__init__(others)
        for name, values in (("neurons", listed(neurons)), ("growth", listed(growth)), ("rates", listed(rates))):
            require(bool(values), f"hebbian.{name}", values, "a number, or a list of at least one")
            for value in (inner for outer in values for inner in listed(outer)):
                require_number(f"hebbian.{name}", value)
                is_count = value < 1 or float(value).is_integer()
                require(name == "rates" or is_count, f"hebbian.{name}", value, "a whole number, or a share below 1")
        require_count("hebbian.inner_steps", inner_steps)
        require_count("hebbian.spiking_levels", spiking_levels, none_means="no rounding")
        require(isinstance(orthonormal, bool), "hebbian.orthonormal", orthonormal, "true or false")
        self.neurons, self.growth, self.rates = neurons, growth, rates
        self.inner_steps, self.orthonormal, self.spiking_levels = inner_steps, orthonormal, spiking_levels

    @property
    def is_off(self) -> bool:
        every = [value for outer in (*listed(self.neurons), *listed(self.growth)) for value in listed(outer)]
        return not any(every)

    def new_subspace(self, number: int) -> Lateral:
        return Lateral(for_layer(self.rates, number), self.inner_steps, self.orthonormal, self.spiking_levels)

    def begin(self, state: TrainState, layers: Layers) -> None:
        experience = state.experience.id
        for number, (name, layer) in enumerate(layers.items()):
            width = layer.weight[0].numel() + (layer.bias is not None)
            draws = state.seeds.fresh(self.name, "rows", name, experience)
            self.subspaces[name].begin_task(self._num_new(experience, number, width), width, layer.weight, draws)

    def _num_new(self, experience: int, number: int, width: int) -> int:
        """Neurons that a layer of so many inputs gets for an experience."""
        values = self.neurons if experience == 0 else self.growth
        if experience > 0 and any(isinstance(value, Sequence) for value in listed(values)):
            values = for_layer(values, experience - 1)
        wanted = for_layer(values, number)
        return int(wanted) if wanted >= 1 else round(wanted * width)

    def rows_at_end(self, state: TrainState) -> Iterator[Tensor]:
        return iter(()) if self.is_off else self.drawn(state, ROWS_AT_A_TIME)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        return batch if self.is_off else super().on_batch(state, batch)
