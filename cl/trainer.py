"""The training loop: one road for every strategy, backbone and stream.

    Trainer(stream, backbone, strategies, optimizer=partial(torch.optim.SGD, lr=0.1)).run()

The hooks are in `cl.hooks`; which rows come next is in `cl.loader`; what is written down is in `cl.ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cl.backbones import Backbone, commit_all
from cl.checkpoint import Keeper
from cl.config import TrainerConfig, is_due
from cl.core import Batch, Experience, Output, Stream, StreamInfo
from cl.distributed import reason
from cl.evaluation import Evaluator
from cl.hooks import Strategy, overrides
from cl.ledger import Ledger, new_result
from cl.loader import check_rows, steps_from, steps_in
from cl.observe import Observer
from cl.result import Result
from cl.schedules import Schedule, constant, fitted, set_learning_rate
from cl.setup import Span, experience_steps, prepare
from cl.state import clear_gradients, current_rows, shares

STEP_HOOKS = ("on_batch", "penalty", "on_gradients", "step", "on_step_end", "make_optimizer")


class Trainer:
    """Train a backbone on a stream with strategies, measure forgetting, and be able to go on exactly where it stopped.

    Args:
        stream: what to learn; the strategies may re-plan it.
        backbone: builds the network for a stream; called under the run's own seed.
        strategies: in the order in which they see the batch.
        optimizer: parameters -> optimizer.
        schedule: factor of the learning rate.
        seed: root of every random draw of the run.
        run_dir: where `result.json` and `checkpoints/` go; None keeps everything in memory.
        observers: told of every event; none of them changes a number.
        names: overrides of the names that `Result` reports, such as {"backbone": "mlp"}.
        settings: every hyper-parameter, flat, for observers.
        fingerprint: of the settings that a checkpoint must agree with.
    """

    def __init__(
        self,
        stream: Stream,
        backbone: Callable[[StreamInfo], nn.Module],
        strategies: Sequence[Strategy],
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Schedule = constant,
        config: TrainerConfig | None = None,
        seed: int = 0,
        run_dir: Path | None = None,
        observers: Sequence[Observer] = (),
        names: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        fingerprint: str = "",
    ) -> None:
        self.config = config or TrainerConfig()
        self.optimizer = optimizer
        self.settings = dict(settings or {})
        self._stop_requested = self._is_stopping = False
        self.strategies: list[Strategy] = []
        self.compose(strategies)
        self.state = prepare(stream, backbone, self.strategies, self._make_optimizer, self.config, seed)
        self.span = Span(experience_steps(self.state.stream, self.config), self.config)
        self.schedule = fitted(schedule, self.span.steps, self.config.schedule_span)
        device = self.state.device
        reported = {"strategy": [strategy.name for strategy in self.strategies]} | dict(names or {})
        told, written = (observers, run_dir) if self.state.world.rank == 0 else ((), None)
        self.ledger = Ledger(new_result(self.state, seed, reported), told, written, device)
        self.evaluator = Evaluator(self.state, self.config, self.ledger, self.strategies)
        self.keeper = Keeper(run_dir, fingerprint, self.state, self.strategies, self.ledger, self.config.batch_size)
        self.state.loss, self.state.strategies = self._loss, self.strategies
        self.state.note = partial(self.ledger.note, self.state)
        self.state.trace = partial(self.ledger.trace, self.state)
        self._committing = [m for m in self.state.model.modules() if isinstance(m, Backbone) and m.commits]

    def compose(self, strategies: Sequence[Strategy]) -> None:
        """Set who is called, and in which order; the loop skips hooks that a strategy does not override."""
        self.strategies[:] = strategies
        self._hooked = {hook: [s for s in self.strategies if overrides(s, hook)] for hook in STEP_HOOKS}

    def request_stop(self) -> None:
        """Stop after the current step, with a checkpoint (safe to call from a signal handler)."""
        self._stop_requested = True

    def run(self, resume: bool = False) -> Result:
        """Train on every experience from where the run stands.

        Returns:
            The result; `status` is "done", or "interrupted" after `request_stop`.

        Raises:
            NonFiniteLoss: and any error of a hook; `result.status` is then "failed" and the file says why.
        """
        result = self.ledger.result
        with self.state.seeds.as_global("torch", *self.state.world.names), self.state.world.quietly():
            start, steps_done = self.keeper.restore() if resume else (0, 0)
            self.ledger.open(self.settings)
            result.status, result.error = "interrupted", ""
            try:
                if not resume:
                    self._begin()
                remaining = self.state.stream.experiences[start:]
                if all(self._learn(each, steps_done if each.id == start else 0) for each in remaining):
                    result.status = "done"
            except Exception as error:
                result.status, result.error = "failed", reason(error)
                raise
            finally:
                self.keeper.finish()
        return result

    def _begin(self) -> None:
        with self.ledger.charged("train_s"):
            for strategy in self.strategies:
                strategy.on_run_start(self.state)
        if self.config.evaluate == "all":
            self.ledger.result.R_init = self.evaluator.row()
        self.keeper.save(next_experience=0, steps_done=0)

    def _learn(self, experience: Experience, steps_done: int) -> bool:
        """Train on one experience and measure; False when asked to stop before its end."""
        state, config, ledger = self.state, self.config, self.ledger
        state.leave()
        with ledger.charged("train_s"):
            state.experience, state.data = experience, experience.load()
            check_rows(state.data, experience)
            num_steps = steps_in(experience, config.budget, state.info)
            state.epoch = max(0, steps_done - 1) // config.budget.steps_per_epoch(len(state.data))
            if steps_done == 0:
                self._enter(experience)
        ledger.tell("on_experience_start", state, num_steps)
        state.model.train()
        steps = steps_from(state, experience, state.data, config.budget, steps_done)
        while steps_done < num_steps:
            begun, pause = steps_done, config.next_pause(steps_done, num_steps)
            with ledger.charged("train_s"):
                while not self._stops() and steps_done < pause:
                    state.epoch, batches = next(steps)
                    self._step(batches, steps_done)
                    steps_done += 1
            if steps_done == 0:  # asked to stop before the first step: the last checkpoint is where the run stands
                return False
            if steps_done < num_steps:
                if steps_done > begun and is_due(config.eval_every, steps_done):  # not again for a stop in between
                    self.evaluator.within()
                if self._is_stopping or is_due(config.checkpoint_every, steps_done):
                    self.keeper.save(experience.id, steps_done)
                if self._is_stopping:
                    return False
        self.keeper.save_open(experience, steps_done)
        with ledger.charged("train_s"):
            for strategy in self.strategies:
                strategy.on_experience_end(state)
        ledger.result.R.append(self.evaluator.row())
        self.keeper.save(experience.id + 1, 0)
        ledger.tell("on_evaluation", state, ledger.result)
        return not self._is_stopping or experience is state.stream.experiences[-1]

    def _stops(self) -> bool:
        """Whether any process was asked to stop; all of them hear the same answer at the same step."""
        self._is_stopping = self.state.world.any(self._stop_requested)
        return self._is_stopping

    def _enter(self, experience: Experience) -> None:
        state = self.state
        state.classes_seen += tuple(c for c in experience.classes if c not in state.classes_seen)
        if self.config.reset_optimizer and experience.id > 0:
            state.optimizer = self._make_optimizer(state.model)
        for strategy in self.strategies:
            strategy.on_experience_start(state)

    def _step(self, batches: Sequence[Batch], step: int) -> None:
        """One optimizer step over its micro-batches; the heart of the platform."""
        state, hooked = self.state, self._hooked
        lr = self._set_learning_rate(step)
        clear_gradients(state.optimizer)
        done: list[tuple[Batch, Output]] = []
        means: dict[str, Tensor] = {}
        state.micro_steps, state.step_rows = len(batches), sum(map(len, batches))
        for state.micro_step, (batch, state.share) in enumerate(zip(batches, shares(batches), strict=True)):
            state.world.sync(state.network, is_last=state.micro_step == len(batches) - 1)
            state.tokens += batch.targets.numel()
            for strategy in hooked["on_batch"]:
                batch = strategy.on_batch(state, batch)
            output, terms = self._loss(state.split(batch))
            if len(batches) > 1:
                terms = {name: term * state.share for name, term in terms.items()}
            first, *others = terms.values()
            state.scaler.scale(sum(others, start=first)).backward()
            for name, term in terms.items():
                means[name] = means[name] + term.detach() if name in means else term.detach()
            done.append((batch, output))
        self.ledger.watch(state, state.world.mean(means), lr)
        self._update(done[-1][0])
        commit_all(self._committing, done)
        state.step += 1
        if hooked["on_step_end"]:
            batch, output = current_rows(done)
            for strategy in hooked["on_step_end"]:
                strategy.on_step_end(state, batch, output)

    def _loss(self, batch: Batch) -> tuple[Output, dict[str, Tensor]]:
        """The output on a batch that the strategies have prepared, and the terms of its loss."""
        output = self.state.forward(batch, self.state.network)
        terms = {"cross_entropy": self.state.label_loss(output, batch)} | output.auxiliary
        for strategy in self._hooked["penalty"]:
            penalty = strategy.penalty(self.state, batch, output)
            if penalty is not None:
                terms[strategy.name] = penalty
        return output, terms

    def _update(self, batch: Batch) -> None:
        state, hooked, clip_norm = self.state, self._hooked, self.config.clip_norm
        if state.scaler.unscale(state.optimizer):
            for strategy in hooked["on_gradients"]:
                strategy.on_gradients(state)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(state.model.parameters(), clip_norm)
            update: Callable[[], Any] = partial(state.scaler.step, state.optimizer)
            for strategy in reversed(hooked["step"]):
                update = partial(strategy.step, state, batch, update)
            update()
        else:
            # the rows were seen and the step is counted, but no hook may learn from gradients that overflowed
            self.ledger.overflow(state)
        state.scaler.update()

    def _make_optimizer(self, model: nn.Module) -> Optimizer:
        makers = self._hooked["make_optimizer"]
        return makers[-1].make_optimizer(model, self.optimizer) if makers else self.optimizer(model.parameters())

    def _set_learning_rate(self, step: int) -> float:
        return set_learning_rate(self.state.optimizer, self.schedule(*self.span.at(self.state.experience.id, step)))
