"""The books of a run: losses watched, seconds charged, observers told, `result.json` written."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl.core import Setting
from cl.loader import tokens_per_row
from cl.metrics import EvalTable, aufc_log_perplexity, language_summary, summary
from cl.observe import Observer
from cl.result import Result, environment
from cl.scaling import SMALLEST_SCALE
from cl.shards import own
from cl.state import TrainState

WATCH_EVERY = {"cpu": 1}
"""Steps between reads of the losses: free on a CPU, a stall on other devices, which read every 20."""

TOKEN_ACCURACY = "token_accuracy"
COURSE = 200
"""Points of the course that a run on text keeps, besides those at measurements."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names the step, the terms and the last good checkpoint."""


class Ledger:
    """Records what a run does; changes nothing of it.

    Args:
        result: filled as the run goes.
        run_dir: where `result.json` is kept current; None keeps it in memory.
    """

    def __init__(
        self, result: Result, observers: Sequence[Observer], run_dir: Path | None, device: torch.device
    ) -> None:
        self.result, self.observers, self.run_dir = result, list(observers), run_dir
        self.clock = {"train_s": 0.0, "eval_s": 0.0, "eval_tokens": 0, "wall_s": 0.0}
        self.buffer_bytes = self.peak_bytes = 0
        self.last_checkpoint: Path | None = None
        self._device, self._every = device, WATCH_EVERY.get(device.type, 20)
        self._pending: list[tuple[int, Mapping[str, Tensor], float]] = []
        self._opened = time.perf_counter()
        self._is_text, self._mark_every, self._lr = False, 1, 0.0

    def follow(self, state: TrainState) -> None:
        """Keep the course of a run on text."""
        self._is_text = state.info.setting == Setting.CONTINUAL_PRETRAINING
        self._mark_every = max(1, state.total_steps // COURSE)

    def open(self, settings: Mapping[str, Any]) -> None:
        self._opened = time.perf_counter() - self.clock["wall_s"]
        if self._device.type == "cuda":  # what a run before this one in the same process took is not this one's
            torch.cuda.reset_peak_memory_stats(self._device)
        self.tell("on_start", self.result, settings)

    def tell(self, event: str, *details: Any) -> None:
        for observer in self.observers:
            getattr(observer, event)(*details)

    @contextmanager
    def charged(self, account: str) -> Iterator[None]:
        """Charge the time spent inside to `account`, until a GPU has done what it was given."""
        begin = time.perf_counter()
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self.clock[account] += time.perf_counter() - begin

    def state_dict(self) -> dict[str, Any]:
        result = self.result
        return {
            "clock": self.clock,
            "buffer_bytes": self.buffer_bytes,
            "peak_bytes": self.peak_bytes,
            "result": [result.R, result.R_init, result.within, result.mlflow_run_id],
            "extra": result.extra,
            "course": result.course,
            "traces": result.traces,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.clock.update(saved["clock"])
        self.buffer_bytes, self.peak_bytes = saved["buffer_bytes"], saved.get("peak_bytes", 0)
        result = self.result
        result.R, result.R_init, result.within, result.mlflow_run_id = saved["result"]
        result.course = saved.get("course", [])
        result.extra, result.traces = saved.get("extra", []), saved.get("traces", [])

    def note(self, state: TrainState, name: str, value: float) -> None:
        """Keep a number that a strategy measured, in the column of the domain that the experience teaches."""
        experience = state.experience.id if state.has_begun else -1
        column = state.stream.trained_domains[experience] if experience >= 0 else 0
        self.result.extra.append([name, experience, max(column, 0), float(value)])

    def trace(self, state: TrainState, name: str, value: float) -> None:
        """Keep a point of a curve over optimizer steps."""
        self.result.traces.append([name, state.step, float(value)])
        self.tell("on_trace", state, name, float(value))

    def overflow(self, state: TrainState) -> None:
        """Write down a step that updates nothing, since its float16 gradients overflowed, with its loss scale.

        Raises:
            NonFiniteLoss: the scale is as small as can be, so that it is not the reason.
        """
        scale = state.scaler.get_scale()
        self.trace(state, "loss_scale", scale)
        if scale < SMALLEST_SCALE:
            raise NonFiniteLoss(self._blame(state, state.step, {"loss_scale": scale}, "the gradients are"))

    def watch(self, state: TrainState, terms: Mapping[str, Tensor], lr: float) -> None:
        """Take note of a step's loss terms before its update.

        Raises:
            NonFiniteLoss: as soon as a noted term is read and is NaN or infinite.
        """
        self._lr = lr
        if self._is_text and (state.step % self._mark_every == 0 or self._is_first(state)):
            self._mark(state, state.step + 1)
        self._pending.append((state.step, terms, lr))
        if len(self._pending) >= self._every:
            self.flush(state)

    def mark(self, state: TrainState) -> None:
        """Write down where a run on text stands, since something is measured there."""
        if self._is_text:
            self._mark(state, state.step)

    def _is_first(self, state: TrainState) -> bool:
        """Whether this is the first step of an experience, where the learning rate may jump."""
        return not self.result.course or self.result.course[-1][0] != state.experience.id

    def _mark(self, state: TrainState, step: int) -> None:
        experience, course = state.experience.id if state.has_begun else -1, self.result.course
        if not course or course[-1][:2] != [experience, step]:
            course.append([experience, step, state.tokens, self._lr])

    def flush(self, state: TrainState) -> None:
        """Read the losses noted since the last time and tell the observers, step by step."""
        pending, self._pending = self._pending, []
        for step, terms, lr in pending:
            losses = {name: float(term) for name, term in terms.items()}
            total = sum(losses.values())
            if not math.isfinite(total):
                raise NonFiniteLoss(self._blame(state, step, losses))
            for observer in self.observers:
                observer.on_step(state, {"loss": total, **losses}, lr)

    def _blame(self, state: TrainState, step: int, losses: Mapping[str, float], what: str = "the loss is") -> str:
        where = f" (experience {state.experience.id}, {state.experience.name!r})" if state.has_begun else ""
        terms = ", ".join(f"{name} = {value:g}" for name, value in losses.items())
        good = (
            f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "there is no checkpoint"
        )
        return f"{what} not finite at step {step}{where}: {terms}; {good}"

    def require_finite_weights(self, state: TrainState) -> None:
        """What the last update broke shows in no loss any more.

        Raises:
            NonFiniteLoss: a weight is infinite or not a number.
        """
        named = state.parameters()
        # of a shard only its owner can say it
        are_broken = state.world.anywhere([not own(p).isfinite().all() for p in named.values()])
        broken = [name for name, is_broken in zip(named, are_broken, strict=True) if is_broken]
        if broken:
            # the first say enough of a large network
            shown = dict.fromkeys(broken[:3], math.nan)
            raise NonFiniteLoss(self._blame(state, state.step - 1, shown, "the update left weights that are"))

    def save(self, state: TrainState, buffer_bytes: int) -> None:
        """Bring `result` up to date and write it."""
        clock = self.clock
        clock["wall_s"] = time.perf_counter() - self._opened
        self.buffer_bytes = max(self.buffer_bytes, buffer_bytes)
        self.peak_bytes = max(self.peak_bytes, peak_memory_bytes(state.device))
        table = EvalTable.from_result(vars(self.result))
        # a head that was never trained answers at chance, which says nothing about transfer
        rows = [each.num_samples for each in state.stream.eval_sets]
        shown = table.mask_untrained() if state.info.num_heads > 1 else table
        self.result.metrics = {**summary(shown, num_samples=rows)}
        if self.result.num_bytes and self.result.R:
            num_tokens, num_bytes = self.result.num_tokens, self.result.num_bytes
            self.result.metrics |= language_summary(table, num_tokens=num_tokens, num_bytes=num_bytes)
        if self.result.measure == "loss" and self.result.R:
            self.result.metrics |= self._over_tokens(table)
        self.result.cost = {
            "train_samples_per_s": state.tokens / clock["train_s"] if clock["train_s"] else 0.0,
            "eval_samples_per_s": clock["eval_tokens"] / clock["eval_s"] if clock["eval_s"] else 0.0,
            "forwards": state.spent.forwards,
            "backwards": state.spent.backwards,
            "updates": state.step,
            "buffer_bytes": self.buffer_bytes,
            "peak_memory_bytes": self.peak_bytes,
            "train_s": clock["train_s"],
            "eval_s": clock["eval_s"],
            "wall_s": clock["wall_s"],
        }
        if self.run_dir is not None:
            self.result.save(self.run_dir / "result.json")

    def _over_tokens(self, table: EvalTable) -> dict[str, float]:
        """Token accuracy at the end, and the area under the forgetting curve over tokens."""
        result, last = self.result, len(self.result.R) - 1
        right = [value for name, i, _, value in result.extra if name == TOKEN_ACCURACY and i == last]
        ends = {int(experience): tokens for experience, _, tokens, _ in result.course}
        positions = [ends[i] for i in range(last + 1) if i in ends]
        area = aufc_log_perplexity(table, positions) if len(positions) == last + 1 else math.nan
        return {TOKEN_ACCURACY: _mean(right), "aufc_log_perplexity": area}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def new_result(state: TrainState, seed: int, names: Mapping[str, Any]) -> Result:
    """The result of a run that is about to start. `names`: stream, strategy, backbone as they are to be reported."""
    stream = state.stream
    sizes = [each.num_bytes for each in stream.eval_sets if each.num_bytes is not None]
    is_text = len(sizes) == len(stream.eval_sets)
    return Result(
        **({"stream": stream.info.name, "backbone": type(state.model).__name__.lower()} | dict(names)),
        setting=str(stream.info.setting),
        seed=seed,
        experiences=[experience.name for experience in stream.experiences],
        domains=[eval_set.domain for eval_set in stream.eval_sets],
        trained=stream.trained_domains,
        practises=stream.practised_domains,
        measure=stream.info.measure,
        num_tokens=[each.num_samples * tokens_per_row(stream.info) for each in stream.eval_sets] if is_text else [],
        num_bytes=sizes if is_text else [],
        R_init=[None] * len(stream.eval_sets),
        env=environment() | {"device": str(state.device), "threads": torch.get_num_threads()},
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the device when it is a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
