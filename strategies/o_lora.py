"""O-LoRA: a new adapter for every experience, kept orthogonal to those of the experiences before.

    W = W_0 + s sum_{i <= t} B_i A_i
    penalty = strength * sum over layers sum |A_past A_t^T|  +  decay * sum over layers (||A_t|| + ||B_t||)

A_past are the rows of all earlier A, frozen. Not peft's `init_lora_weights="olora"`, which draws adapters from a QR
decomposition.

Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP Findings 2023; code
cmnfriend/O-LoRA (src/uie_trainer_lora.py: absolute values, where the paper squares; `measure` offers both).
Differences: the adapter of a finished experience is added to the weights and its A kept aside, which is the same model
with one adapter; the penalty is in the loss before it is divided by the micro-batches; one strength for all
experiences, where the scripts set one by hand for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.core import Batch, Output, Setting
from cl.hooks import Contract
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require_choice, require_number
from strategies._lora import MEASURES, LoraStrategy, pairs, summed
from strategies._quadratic import Vectors, copied


class OLora(LoraStrategy):
    """Learn every experience in a subspace of its own.

    Args:
        strength: lambda_1, of the orthogonality; the code's default is 0.5.
        decay: lambda_2, of the norms of the new adapter.
        measure: of the inner products: absolute, or squared.

    Raises:
        UserError: the model has no LoRA adapters, or a strategy beside it that goes by those of earlier experiences.

    Cost: no rows; the A of every experience, and their products with the running one at every step.
    """

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})
    merges = True
    contract = Contract(
        why_not_zero="every experience begins with a new adapter",
        forgets_less_by=0.25,
    )

    def __init__(self, strength: float = 0.5, decay: float = 0.0, measure: str = "absolute") -> None:
        require_number("o_lora.strength", strength)
        require_number("o_lora.decay", decay)
        require_choice("o_lora.measure", measure, tuple(MEASURES))
        self.strength, self.decay, self.measure = strength, decay, MEASURES[measure]
        self.past: Vectors = {}

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        found, terms = pairs(state.model), []
        if self.strength > 0 and self.past:
            overlaps = (self.measure(self.past[name] @ pair.a.T).sum() for name, pair in found.items())
            terms.append(self.strength * summed(overlaps))
        if self.decay > 0:
            terms.append(self.decay * summed(pair.a.norm() + pair.b.norm() for pair in found.values()))
        return summed(terms) if terms else None

    def on_experience_end(self, state: TrainState) -> None:
        if state.experience is state.stream.experiences[-1]:
            return
        for name, pair in pairs(state.model).items():
            rows = pair.a.detach().clone()
            self.past[name] = torch.cat([self.past[name], rows]) if name in self.past else rows
        self.begin_anew(state)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.past))

    def state_dict(self) -> dict[str, Any]:
        return {"past": self.past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past = copied(state["past"])
