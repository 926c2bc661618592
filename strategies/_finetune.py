"""What FPF and k-FPF have in common: finetune some modules of the model on stored rows, everything else frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.buffers.base import Buffer
from cl.core import Batch, Output, Stream, StreamInfo, UserError
from cl.hooks import Strategy
from cl.schedules import cosine, set_learning_rate
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_count, require_number, require_stored
from strategies._modules import Parameters, SwitchTracker, matching, most_sensitive, training_only
from strategies._rehearsal import Rehearsal
from strategies.remind import Remind


class Finetune(Rehearsal):
    """Owner or borrower of a buffer, who finetunes on it, at the end of training at least.

    Args:
        modules: which modules are finetuned. "all"; "auto", the most sensitive ones; or patterns of module names and
            classes, such as [head, BatchNorm2d].
        buffer_of: name of another strategy whose buffer is used; None keeps one of its own.
        capacity, policy: of its own buffer, which is filled after every step.
        steps: of one finetuning; 0 changes nothing.
        replay_batch_size: rows of a finetuning step, drawn with replacement while fewer are stored.
        lr, momentum: of the finetuning's own SGD, which starts anew each time with a cosine from `lr` to 0; what the
            run's optimizer keeps is left alone.
        repeats: finetunings back to back.
        alpha: factor of the squared distance to the stored logits.
        updates_statistics: finetuning moves the running statistics of batch norm; otherwise batch norm uses them.
        snapshot_steps: "auto" compares the weights every so many steps.
        auto_frac: most of the parameters that "auto" takes.
    """

    moves_weights = True

    def __init__(
        self,
        modules: str | Sequence[str] = "auto",
        buffer_of: str | None = None,
        capacity: int = 200,
        policy: str = "reservoir",
        steps: int = 300,
        replay_batch_size: int = 32,
        lr: float = 0.05,
        momentum: float = 0.9,
        repeats: int = 1,
        updates_statistics: bool = True,
        snapshot_steps: int = 100,
        auto_frac: float = 0.05,
        alpha: float = 0.0,
    ) -> None:
        name = self.name
        require_count(f"{name}.replay_batch_size", replay_batch_size)
        super().__init__(capacity, replay_batch_size, policy)
        listed = [modules] if isinstance(modules, str) else modules
        are_patterns = (
            isinstance(listed, Sequence) and listed and all(each and isinstance(each, str) for each in listed)
        )
        require(bool(are_patterns), f"{name}.modules", modules, "auto, all, or a list of patterns of module names")
        if buffer_of is None:
            require_stored(name, replay_batch_size, capacity)
        is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
        require(is_count, f"{name}.steps", steps, "an integer of at least 0")
        require_number(f"{name}.lr", lr, above=0.0)
        require_number(f"{name}.momentum", momentum)
        require(momentum < 1, f"{name}.momentum", momentum, "below 1")
        require_count(f"{name}.repeats", repeats)
        require_number(f"{name}.alpha", alpha)
        require_count(f"{name}.snapshot_steps", snapshot_steps)
        require_number(f"{name}.auto_frac", auto_frac, above=0.0)
        require(auto_frac <= 1, f"{name}.auto_frac", auto_frac, "at most 1")
        self.modules = list(listed)
        self.buffer_of, self.steps, self.repeats, self.alpha = buffer_of, steps, repeats, alpha
        self.num_rows, self.lr, self.momentum = replay_batch_size, lr, momentum
        self.updates_statistics, self.auto_frac = updates_statistics, auto_frac
        self.tracker = SwitchTracker(snapshot_steps) if self.modules == ["auto"] else None

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if self.buffer_of == self.name:
            raise UserError(f"{self.name}.buffer_of is its own name; leave it null for a buffer of its own")

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        if self.modules not in (["auto"], ["all"]):
            matching(model, self.modules, f"{self.name}.modules")

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        if any(isinstance(each, Remind) and each.name == self.buffer_of for each in strategies):
            raise UserError(
                f"{self.name}.buffer_of is {self.buffer_of!r}, whose rows are codes that the model does not read; name "
                "a strategy that stores inputs, or leave it null for a buffer of its own"
            )
        capacity = self.source(strategies).capacity
        allowed = f"at most the capacity of the buffer of {self.buffer_of}, {capacity}"
        require(self.num_rows <= capacity, f"{self.name}.replay_batch_size", self.num_rows, allowed)

    def on_experience_start(self, state: TrainState) -> None:
        if self.tracker is not None:
            self.tracker.enter(state)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.buffer_of is None:
            extra = {"logits": output.logits.float()} if self.alpha > 0 else {}
            self.buffer.add(batch, self.generator(state), **extra)
        if self.tracker is not None:
            self.tracker.step(state)

    def on_experience_end(self, state: TrainState) -> None:
        if state.experience is state.stream.experiences[-1]:
            self.finetune(state)

    def source(self, strategies: Sequence[Strategy]) -> Buffer:
        """The buffer that is finetuned on: its own, or that of another strategy of the run."""
        if self.buffer_of is None:
            return self.buffer
        buffers = {s.name: s.buffer for s in strategies if s is not self and hasattr(s, "buffer")}
        names = ", ".join(buffers) or "no strategy of this run"
        allowed = f"a strategy that keeps a buffer beside {self.name} ({names}), or null for a buffer of its own"
        require(self.buffer_of in buffers, f"{self.name}.buffer_of", self.buffer_of, allowed)
        found: Buffer = buffers[self.buffer_of]
        return found

    def chosen(self, state: TrainState) -> Parameters:
        """Parameters that are finetuned; all of them while "auto" has nothing to rank by."""
        if self.tracker is not None:
            return most_sensitive(state, self.tracker.ranking(), self.auto_frac) or state.parameters()
        if self.modules == ["all"]:
            return state.parameters()
        return matching(state.model, self.modules, f"{self.name}.modules")

    def finetune(self, state: TrainState) -> None:
        """`repeats` finetunings of the chosen modules, on rows drawn anew for every step.

        Not the loop's steps: nothing is clipped, and hooks of other strategies are not called.
        """
        buffer = self.source(state.strategies)
        if self.steps == 0 or len(buffer) == 0:
            return
        if self.alpha > 0 and "logits" not in buffer.columns:
            raise UserError(f"{self.name}.alpha needs stored logits, and {self.buffer_of} stores none; take 0, or der")
        chosen = self.chosen(state)
        with training_only(state.model, chosen, keeps_statistics=not self.updates_statistics):
            for _ in range(self.repeats):
                optimizer = torch.optim.SGD(chosen.values(), self.lr, self.momentum)
                for step in range(self.steps):
                    set_learning_rate(optimizer, cosine(step, self.steps))
                    loss = self._loss(state, buffer)
                    if loss.requires_grad:  # not when the rows' heads are none of the chosen modules
                        state.backward(loss, chosen.values())
                        optimizer.step()
        if self.tracker is not None:
            self.tracker.interrupt()

    def _loss(self, state: TrainState, buffer: Buffer) -> Tensor:
        generator = self.generator(state)
        if len(buffer) < self.num_rows:
            slots = torch.randint(len(buffer), (self.num_rows,), generator=generator)
        else:
            slots = buffer.draw(self.num_rows, generator)
        rows = state.prepare(buffer.rows(slots), generator)
        output = state.forward(rows)
        if not output.logits.requires_grad:
            state.count(backwards=-len(rows))
        loss = state.label_loss(output, rows)
        if self.alpha == 0:
            return loss
        return loss + self.alpha * F.mse_loss(output.logits.float(), buffer.take("logits", slots).to(state.device))

    @property
    def rows_per_finetuning(self) -> int:
        """Rows forward and backward each time `finetune` does something."""
        return self.repeats * self.steps * self.num_rows

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        tracked = {} if self.tracker is None else self.tracker.before
        return Cost(buffer_bytes=self.buffer_bytes + tensor_bytes(tracked))

    def state_dict(self) -> dict[str, Any]:
        tracker = {} if self.tracker is None else {"tracker": self.tracker.state_dict()}
        return {"buffer": super().state_dict()} | tracker

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["buffer"])
        if self.tracker is not None:
            self.tracker.load_state_dict(state["tracker"])
