"""Some modules of a model: named by patterns, ranked by how they react to a new experience, trained alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cl.backbones import MultiHead
from cl.core import UserError
from cl.metrics.sensitivity import Change, mean_change, module_of, ranked, sensitivity
from cl.state import TrainState
from strategies._quadratic import Vectors, copied, snapshot

Parameters = dict[str, nn.Parameter]


def compute_once(backbone: nn.Module) -> None:
    """Keep a backbone from computing anything again in the backward pass: weights lent for a call are gone by then.

    Segments and blocks that save memory that way (`is_checkpointed`, `is_replayed`) keep what they computed instead.
    """
    for module in backbone.modules():
        for flag in ("is_checkpointed", "is_replayed"):
            if getattr(module, flag, False):
                setattr(module, flag, False)


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own trained parameters themselves, by name.

    Example:
        >>> list(owners(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))))
        ['0', '2']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }


def units(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> the module it is ranked with: its owner, or all heads together."""
    heads = [f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, MultiHead)]
    names = [name for name, _ in model.named_parameters()]
    return {name: next((h.rstrip(".") for h in heads if name.startswith(h)), module_of(name)) for name in names}


def matching(model: nn.Module, patterns: Sequence[str], argument: str) -> Parameters:
    """Trained parameters of the modules that a pattern matches.

    A pattern with the wildcards * and ? matches the name of a module, of a module that contains it, or its class:
    "head", "body.*", "BatchNorm2d".

    Raises:
        UserError: a pattern that matches nothing; the sentence lists the names there are.
    """
    modules = owners(model)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name, module in modules.items() if _matches(name, module, pattern)}
        if not found:
            names = ", ".join(f"{name or '(the model itself)'} ({type(m).__name__})" for name, m in modules.items())
            raise UserError(
                f"{argument} has {pattern!r}, which matches no module with parameters; the model's modules are {names}"
            )
        chosen |= found
    return {name: p for name, p in model.named_parameters() if p.requires_grad and module_of(name) in chosen}


def _matches(name: str, module: nn.Module, pattern: str) -> bool:
    steps = name.split(".")
    prefixes = [".".join(steps[: k + 1]) for k in range(len(steps))]
    return fnmatchcase(type(module).__name__, pattern) or any(fnmatchcase(prefix, pattern) for prefix in prefixes)


@contextmanager
def training_only(model: nn.Module, chosen: Mapping[str, nn.Parameter], keeps_statistics: bool) -> Iterator[None]:
    """Everything but the chosen parameters is frozen inside; `requires_grad`, gradients and modes are as found after.

    What needs no gradient ends the backward pass, so nothing is computed below the lowest chosen module.

    Args:
        keeps_statistics: batch norm uses its running statistics and leaves them as they are.
    """
    kept = {id(p) for p in chosen.values()}
    found = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    norms = [(m, m.training) for m in model.modules() if isinstance(m, _NormBase)] if keeps_statistics else []
    try:
        for p, requires_grad, _ in found:
            p.requires_grad_(requires_grad and id(p) in kept)
        for norm, _ in norms:
            norm.eval()
        yield
    finally:
        for p, requires_grad, gradient in found:
            p.requires_grad_(requires_grad)
            p.grad = gradient
        for norm, mode in norms:
            norm.train(mode)


class SwitchTracker:
    """Follows how modules change after a switch and later, without keeping more than one snapshot.

    Args:
        every: steps between snapshots, counted from the start of each experience.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.before: Vectors = {}
        self.experience = self.steps = 0
        self.is_broken = False
        # a run's changes are only ever averaged: one sum of first and one of late intervals
        self.sums: dict[str, dict[str, float]] = {"first": {}, "late": {}}
        self.counts = {"first": 0, "late": 0}

    def enter(self, state: TrainState) -> None:
        """An experience begins."""
        self.experience, self.steps = state.experience.id, 0
        self.before, self.is_broken = self._now(state), False

    def step(self, state: TrainState) -> None:
        """An optimizer step was taken."""
        self.steps += 1
        if self.steps % self.every:
            return
        now, interval = self._now(state), self.steps // self.every - 1
        if not self.is_broken and (self.experience > 0 or interval > 0):
            self._add(
                "first" if interval == 0 else "late", mean_change(self.before, now, units(state.model).__getitem__)
            )
        self.before, self.is_broken = now, False

    def interrupt(self) -> None:
        """Something else moved the weights: the running interval does not count."""
        self.is_broken = True

    def ranking(self) -> list[str]:
        """Modules, the most sensitive one first; empty before there was a switch and a late interval."""
        kinds = (("first", 1, 0), ("late", 1, 1))
        means = [
            Change(experience, interval, {name: total / self.counts[kind] for name, total in self.sums[kind].items()})
            for kind, experience, interval in kinds
            if self.counts[kind]
        ]
        return ranked(sensitivity(means))

    def _add(self, kind: str, change: Mapping[str, float]) -> None:
        sums = self.sums[kind]
        for name, value in change.items():
            sums[name] = sums.get(name, 0.0) + value
        self.counts[kind] += 1

    def _now(self, state: TrainState) -> Vectors:
        return {name: value.cpu() for name, value in snapshot(state).items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "position": [self.experience, self.steps, int(self.is_broken)],
            "sums": {kind: dict(sums) for kind, sums in self.sums.items()},
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # beside later snapshots, which are on the CPU
        self.before = {name: value.cpu() for name, value in copied(state["before"]).items()}
        self.experience, self.steps, is_broken = state["position"]
        self.is_broken = bool(is_broken)
        self.sums = {kind: dict(sums) for kind, sums in state["sums"].items()}
        self.counts = dict(state["counts"])


def most_sensitive(state: TrainState, ranking: Sequence[str], frac: float) -> Parameters:
    """Parameters of the first modules of a ranking, as many as make up at most `frac` of all; one at least."""
    every, unit = state.parameters(), units(state.model)
    most = frac * sum(p.numel() for p in every.values())
    chosen: Parameters = {}
    for module in ranking:
        more = {name: p for name, p in every.items() if unit[name] == module}
        if chosen and sum(p.numel() for p in (*chosen.values(), *more.values())) > most:
            break
        chosen |= more
    return chosen
