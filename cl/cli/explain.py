"""Look inside one step: learning rate, where rows come from, what the loss is made of, which hooks run, what it costs.

Usage: cl explain [name=value ...] [at=STEP]

  cl explain stream=split_digits 'strategy=[derpp,ewc]' at=20
  cl explain sensitivity=5 figure=modules.png                       which modules react most to a new experience

Trains silently up to step `at` (default: the first step of the second experience), then takes that step apart. Takes
every override that `cl run` takes; writes nothing. With sensitivity=STEPS it compares the weights of a whole run every
STEPS steps instead; `figure=FILE.png` draws what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cl.cli import build, sensitivity
from cl.cli.compose import composed, import_from_here, plain
from cl.cli.plot import curve
from cl.core import Batch, Output, UserError
from cl.hooks import Strategy, overrides
from cl.observe import Observer
from cl.setup import experience_steps
from cl.state import Cost, TrainState

HOOKS = (
    "plan",
    "wrap",
    "make_optimizer",
    "on_run_start",
    "on_experience_start",
    "on_batch",
    "penalty",
    "on_gradients",
    "step",
    "on_step_end",
    "on_experience_end",
    "eval_forward",
    "on_evaluation",
    "on_resume",
)


@dataclass
class Seen:
    """What was seen of step `at`, in all its micro-batches together.

    Args:
        parts: (place in the batch, source, owner) -> rows, weight of their mean cross-entropy.
    """

    at: int
    experience: str = ""
    parts: dict[tuple[int, str, str], tuple[int, float]] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    gradient_before: Tensor | None = None
    gradient_after: Tensor | None = None
    update_norm: float = 0.0
    declared: Cost = field(default_factory=Cost)
    spent: Cost = field(default_factory=Cost)


class Head(Strategy):
    """First in the chain: sees the batch and the gradient before anybody changed them, and the whole update."""

    def __init__(self, seen: Seen, strategies: Sequence[Strategy]) -> None:
        self.seen, self.strategies = seen, strategies

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if state.step == self.seen.at and state.micro_step == 0:
            self._start = Cost(state.spent.forwards, state.spent.backwards)
            rows = Cost(state.step_rows, state.step_rows)
            self.seen.declared = sum((s.cost(state, state.step_rows) for s in self.strategies), start=rows)
        return batch

    def on_gradients(self, state: TrainState) -> None:
        if state.step == self.seen.at:
            self.seen.gradient_before = _gradient(state)

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        before = [p.detach().clone() for p in state.parameters().values()] if state.step == self.seen.at else []
        update()
        if before:
            moved = [p.detach() - old for p, old in zip(state.parameters().values(), before, strict=True)]
            self.seen.update_norm = float(_flat(moved).norm())

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if state.step == self.seen.at + 1:
            spent = state.spent
            self.seen.spent = Cost(spent.forwards - self._start.forwards, spent.backwards - self._start.backwards)


class Tail(Strategy):
    """Last in the chain: sees the batch and the gradient as the others left them."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> None:
        if state.step == self.seen.at:
            self.seen.experience = state.experience.name
            for place, part in enumerate(batch.parts):
                key = (place, part.source.value, part.owner)
                rows, weight = self.seen.parts.get(key, (0, 0.0))
                self.seen.parts[key] = (rows + len(part), weight + part.weight * state.share)

    def on_gradients(self, state: TrainState) -> None:
        if state.step == self.seen.at:
            self.seen.gradient_after = _gradient(state)


class Losses(Observer):
    """Keeps the loss terms of the step, and stops the run after it."""

    def __init__(self, seen: Seen, stop: Callable[[], None]) -> None:
        self.seen, self.stop = seen, stop

    def on_step(self, state: TrainState, losses: Mapping[str, float], lr: float) -> None:
        if state.step == self.seen.at:
            self.seen.losses = losses
            self.stop()


def main(words: list[str]) -> int:
    """Explain one step of a run."""
    if any(word.startswith("sensitivity=") for word in words):
        return sensitivity.main(words)
    import_from_here()
    at = [word.removeprefix("at=") for word in words if word.startswith("at=")]
    config = plain(composed("run", [word for word in words if not word.startswith("at=")]))
    trainer = build.make_trainer(config, {}, run_dir=None, observers=())
    state, strategies = trainer.state, list(trainer.strategies)
    seen = Seen(_step_number(at[-1], state.total_steps) if at else _second_experience(trainer))
    # the probes join before anything has run, so the hooks they need are looked up as for any strategy
    trainer.compose([Head(seen, strategies), *strategies, Tail(seen)])
    trainer.ledger.observers.append(Losses(seen, trainer.request_stop))
    plot = schedule_plot(trainer)
    trainer.run()
    console = Console(markup=False)
    console.print(f"learning rate over {trainer.state.total_steps} steps, with the first of each experience")
    console.print(plot, highlight=False, soft_wrap=True)
    console.print()
    show(console, seen, strategies)
    return 0


def _step_number(text: str, total: int) -> int:
    if not text.isdigit() or int(text) >= total:
        raise UserError(f"at is {text!r}; it must be a step from 0 to {total - 1}")
    return int(text)


def _second_experience(trainer: Any) -> int:
    experiences = trainer.state.stream.experiences
    steps = experience_steps(trainer.state.stream, trainer.config)[0]
    return steps if len(experiences) > 1 else steps - 1


def schedule_plot(trainer: Any) -> str:
    """The learning rate over the whole run; ticks are the first steps of the experiences."""
    steps = experience_steps(trainer.state.stream, trainer.config)
    base = max(group.get("initial_lr", group["lr"]) for group in trainer.state.optimizer.param_groups)
    starts = list(accumulate(steps[:-1], initial=0))
    places = (trainer.span.at(k, step) for k, count in enumerate(steps) for step in range(count))
    factors = [trainer.schedule(*place) for place in places]
    return curve([base * factor for factor in factors], starts)


def show(console: Console, seen: Seen, strategies: Sequence[Strategy]) -> None:
    """Print what was seen."""
    console.print(f"step {seen.at}, experience {seen.experience!r}", highlight=False)
    console.print(_table("rows", ("source", "added by", "rows", "weight of their mean cross-entropy"), [
        (source, owner, str(rows), f"{weight:g}") for (_, source, owner), (rows, weight) in seen.parts.items()
    ]))  # fmt: skip
    console.print(_table("loss", ("term", "value"), [(name, f"{value:.6g}") for name, value in seen.losses.items()]))
    console.print(_table("gradient and update", ("what", "value"), _gradient_rows(seen)))
    console.print(_table("hooks, in the order in which they run", ("hook", "strategies"), [
        (hook, ", ".join(s.name for s in strategies if overrides(s, hook)) or "-") for hook in HOOKS
    ]))  # fmt: skip
    console.print(_table("cost of this step, in rows", ("", "declared", "counted"), [
        ("forwards", str(seen.declared.forwards), str(seen.spent.forwards)),
        ("backwards", str(seen.declared.backwards), str(seen.spent.backwards)),
        ("bytes kept", str(seen.declared.buffer_bytes), ""),
    ]))  # fmt: skip


def _gradient_rows(seen: Seen) -> list[tuple[str, str]]:
    before, after = seen.gradient_before, seen.gradient_after
    if before is None or after is None:
        return []
    # in single precision the same gradient twice is at 1.00001
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=0)
    return [
        ("norm of the gradient", f"{float(before.norm()):.6g}"),
        ("norm after on_gradients", f"{float(after.norm()):.6g}"),
        ("cosine between the two", f"{float(cosine):.6f}"),
        ("norm of the update", f"{seen.update_norm:.6g}"),
    ]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def _gradient(state: TrainState) -> Tensor:
    """Of all weights; zeros where a strategy, or the loss, gives none."""
    return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in state.parameters().values()])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
