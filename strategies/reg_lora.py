"""RegLoRA: what the adapters of earlier experiences changed most is changed no further.

    penalty = strength * sum over layers sum |s B A * R|,  R the top entries of |s B_i A_i| of every i < t

After an experience the largest entries of each layer's change are marked, the adapter is added to the weights, and a
new one begins. The data side of the method, answers in several styles, is `stream.diversify` of text_tasks: together
they are SEFE, which tells forgetting of the format (superficial) from forgetting of the content (essential).

Source: Chen et al., "SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction
Tuning", ICML 2025; code jinpeng0528/SEFE (key_elements_identification.py, llava/model/language_model), which marks 2 %.
Differences: sums, where the code takes means over the marks of a layer and over layers, leaves out s, and counts an
entry as often as it was marked; its strength of 2500 is 2500 / (s * layers * marks of one) here. The default is ours,
and has to be tuned. Text only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl.core import Batch, Output, Setting
from cl.hooks import Contract
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_choice, require_number
from strategies._lora import MEASURES, LoraStrategy, pairs, summed
from strategies._quadratic import Vectors


class RegLora(LoraStrategy):
    """Mark the entries that an experience changed most, and hold them.

    Args:
        strength: lambda.
        top: percent of each layer's entries that an experience marks.
        measure: of the new change at marked entries: absolute, or squared.

    Raises:
        UserError: the model has no LoRA adapters, or a strategy beside it that goes by those of earlier experiences.

    Cost: no rows; a byte per adapted weight (a bit in checkpoints), and the product B A of every layer at every step.
    """

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})
    merges = True
    contract = Contract(
        toy={"strength": 0.5, "top": 20.0},
        why_not_zero="every experience begins with a new adapter",
        forgets_less_by=0.8,
    )

    def __init__(self, strength: float = 0.01, top: float = 2.0, measure: str = "absolute") -> None:
        require_number("reg_lora.strength", strength)
        require_number("reg_lora.top", top, above=0.0)
        require(top <= 100, "reg_lora.top", top, "a percentage of at most 100")
        require_choice("reg_lora.measure", measure, tuple(MEASURES))
        self.strength, self.top, self.measure = strength, top, MEASURES[measure]
        self.marked: Vectors = {}

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if self.strength == 0 or not self.marked:
            return None
        changes = ((self.marked[name], pair.change()) for name, pair in pairs(state.model).items())
        return self.strength * summed((self.measure(change) * marked).sum() for marked, change in changes)

    def on_experience_end(self, state: TrainState) -> None:
        if state.experience is state.stream.experiences[-1]:
            return
        for name, pair in pairs(state.model).items():
            size = pair.change().detach().abs()
            count = max(1, round(size.numel() * self.top / 100))
            mask = torch.zeros_like(size, dtype=torch.bool)
            mask.view(-1)[size.flatten().topk(count).indices] = True
            self.marked[name] = self.marked[name] | mask if name in self.marked else mask
        self.begin_anew(state)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.marked))

    def state_dict(self) -> dict[str, Any]:
        bits = {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in self.marked.items()}
        return {"bits": bits, "shapes": {name: list(mask.shape) for name, mask in self.marked.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.marked = {}
        for name, shape in state["shapes"].items():
            bits, count = state["bits"][name], shape[0] * shape[1]
            mask = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count)).bool()
            self.marked[name] = mask.view(shape).to(bits.device)
