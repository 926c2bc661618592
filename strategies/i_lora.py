"""I-LoRA: a fast adapter that learns, and a slow one between where it was and is, which holds stored rows in place.

    slow <- a slow + (1 - a) fast,   a = min(1 - 1 / (k + 1), ema_decay)          after step k
    loss = (CE(current) + weight * CE(stored)) / (1 + weight) + gamma * mean (h_fast - h_slow)^2   on stored rows

h is what the head reads. Stored rows come in from the second experience on; the slow adapter is what is evaluated.

Source: Ren et al., "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning", 2024 (I-LoRA); code
which47/LLMCL method/ILORA.py.
Differences: this is the paper's rule. The code's ema_decay of 0.25 makes the slow adapter follow the fast one within
two steps; its target is the larger of the two states, entry by entry (`target="max"`), at every layer; and its stored
rows lose their mask. Here tokens that are not to be learnt take no part, and rows are stored by a reservoir.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from cl.core import IGNORED, Batch, Output, Setting, Source, UserError
from cl.hooks import Contract
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_choice, require_number
from strategies._lora import LoraStrategy
from strategies._modes import evaluation_mode
from strategies._quadratic import Vectors, copied, snapshot
from strategies._rehearsal import Rehearsal


class ILora(LoraStrategy, Rehearsal):
    """Interpolate a slow adapter and pull stored rows towards what it says.

    Args:
        capacity: rows stored.
        replay_batch_size: stored rows per step; None takes as many as the step has of the stream.
        weight: of the stored rows' label loss.
        gamma: of the squared distance to the slow adapter's states.
        ema_decay: a, once the run is long enough.
        target: "slow" states, or "max" of slow and fast ones, as the code has it.
        evaluate: "slow" or "fast" adapter answers.

    Raises:
        UserError: the model has no LoRA adapters, or does not say what its head reads.

    Cost: replay_batch_size more rows forward and backward per step, and once more forward; a copy of the adapters.
    """

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})
    contract = Contract(
        toy={"capacity": 100}, zero={"weight": 0.0, "gamma": 0.0, "evaluate": "fast"}, forgets_less_by=0.1
    )

    def __init__(
        self,
        capacity: int = 500,
        replay_batch_size: int | None = None,
        weight: float = 1.0,
        gamma: float = 1.0,
        ema_decay: float = 0.99,
        target: str = "slow",
        evaluate: str = "slow",
    ) -> None:
        super().__init__(capacity, replay_batch_size)
        require_number("i_lora.weight", weight)
        require_number("i_lora.gamma", gamma)
        require_number("i_lora.ema_decay", ema_decay)
        require(ema_decay < 1, "i_lora.ema_decay", ema_decay, "below 1")
        require_choice("i_lora.target", target, ("slow", "max"))
        require_choice("i_lora.evaluate", evaluate, ("slow", "fast"))
        self.weight, self.gamma, self.ema_decay = weight, gamma, ema_decay
        self.target, self.evaluate = target, evaluate
        self.slow: Vectors = {}
        self.steps = 0

    @property
    def is_off(self) -> bool:
        """Whether stored rows have no part in the loss."""
        return self.weight == 0 and self.gamma == 0

    def on_run_start(self, state: TrainState) -> None:
        self.slow = snapshot(state)

    def _num_rows(self, state: TrainState, batch_size: int) -> int:
        is_first = not state.has_begun or state.experience.id == 0
        return 0 if self.is_off or is_first else self.num_drawn(batch_size)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if self._num_rows(state, state.step_rows) == 0:
            return batch
        rows, _ = self.shown(state, batch)
        share = 1 / (1 + self.weight)
        scaled = replace(batch, parts=tuple(replace(part, weight=part.weight * share) for part in batch.parts))
        return scaled.extended(rows, Source.REPLAY, self.name, self.weight * share * self.spread.factor)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        parts = batch.parts_of(self.name)
        if self.gamma == 0 or not parts:
            return None
        if output.hidden is None:
            raise UserError(f"i_lora compares what the head reads, and {type(state.model).__name__} does not say it")
        rows, fast_BTD = batch[parts[0].rows], output.hidden[parts[0].rows].float()
        with torch.no_grad(), evaluation_mode(state.model):
            slow_BTD = state.forward(rows, lambda some: self._answer(state, some)).features.float()
        if self.target == "max":
            slow_BTD = torch.maximum(slow_BTD, fast_BTD.detach())
        apart = (fast_BTD - slow_BTD)[rows.targets != IGNORED].square()
        # no mean over nothing, where no token of these rows is to be learnt
        return self.gamma * self.spread.factor * apart.sum() / max(1, apart.numel())

    def _answer(self, state: TrainState, rows: Batch) -> Output:
        output: Output = functional_call(state.model, self.slow, (rows,))
        return output

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        self.steps += 1
        a = min(1 - 1 / (self.steps + 1), self.ema_decay)
        with torch.no_grad():
            for name, p in state.parameters().items():
                self.slow[name].lerp_(p, 1 - a)
        if not self.is_off:
            self.buffer.add(batch, self.generator(state))

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        if self.evaluate == "fast" or not self.slow:
            return None
        with state.autocast():
            return self._answer(state, batch)

    @torch.no_grad()
    def settle(self, state: TrainState) -> None:
        if self.evaluate == "slow":
            for name, p in state.parameters().items():
                p.copy_(self.slow.get(name, p))

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = self._num_rows(state, batch_size)
        return Cost(extra + (extra if self.gamma > 0 else 0), extra, self.buffer_bytes + tensor_bytes(self.slow))

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": super().state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["buffer"])
        self.slow, self.steps = copied(state["slow"]), state["steps"]
