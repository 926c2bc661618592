"""Strategies of ours inside Avalanche's training templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones import Backbone, commit_all
from cl.core import Batch, Output, Stream, UserError
from cl.hooks import Strategy, check_all, overrides
from cl.interop._benchmark import Minibatch, OurExperience, Rows, as_dataset, minibatch
from cl.interop._network import announce, as_backbone, as_model, last_output, rows_of
from cl.interop._quiet import quiet
from cl.interop._streams import from_avalanche
from cl.seeding import Seeds
from cl.state import TrainState, current_rows

with quiet():
    from avalanche.core import SupervisedPlugin

NEED_OUR_TEMPLATE = ("step", "make_optimizer")
"""Hooks that Avalanche has no callback for; `Template` calls them."""


class OurPlugin(SupervisedPlugin):
    """One or several strategies of ours as one plugin; see `as_plugin`."""

    def __init__(self, strategies: Sequence[Strategy], seed: int = 0, stream: Stream | None = None) -> None:
        super().__init__()
        self.strategies, self.seed, self.stream = list(strategies), seed, stream
        self.state: TrainState | None = None
        self.batch: Batch | None = None
        self.output: Output | None = None
        self.adapted: Any = None
        self.random_state: Tensor | None = None
        """Of torch's generator when the backbone had been drawn: our loop draws what is put around it right after."""

    def hooked(self, hook: str) -> list[Strategy]:
        return [strategy for strategy in self.strategies if overrides(strategy, hook)]

    @property
    def owns_optimizer(self) -> bool:
        """Whether Avalanche must leave the parameter groups alone."""
        return bool(self.hooked("make_optimizer") or self.hooked("wrap"))

    # the run

    def before_train_dataset_adaptation(self, template: Any, **kwargs: Any) -> None:
        if self.state is None:
            self._begin(template)

    def _begin(self, template: Any) -> None:
        """As `cl.setup.prepare`, around the model and the optimizer that the template already has."""
        self._refuse_what_cannot_work(template)
        stream = self._stream_of(template)
        check_all(self.strategies, stream)
        for strategy in self.strategies:
            stream = strategy.plan(stream)
        seeds = Seeds(self.seed)
        model = as_backbone(template.model)
        if self.hooked("wrap"):
            with seeds.as_global("init", "wrap"):
                if self.random_state is not None:
                    torch.set_rng_state(self.random_state)
                for strategy in self.strategies:
                    model = strategy.wrap(model, stream.info)
            template.model = as_model(model.to(template.device), stream.info.num_heads)
        for strategy in self.strategies:
            strategy.check_model(model, stream.info)
        if self.owns_optimizer:
            template.optimizer = self._optimizer(template.optimizer, model)
        self.state = TrainState(model, template.optimizer, stream, seeds, template.device, nullcontext)
        self.state.loss, self.state.strategies = partial(self._whole_loss, template), self.strategies
        batches = [-(-e.num_samples // template.train_mb_size) for e in stream.experiences]
        self.state.experience_steps = [count * template.train_epochs for count in batches]
        self.state.total_steps = sum(self.state.experience_steps)
        template._criterion = PartLoss(self, template._criterion)
        for strategy in self.strategies:
            strategy.on_run_start(self.state)

    def _refuse_what_cannot_work(self, template: Any) -> None:
        others = [p for p in template.plugins if isinstance(p, OurPlugin) and p is not self]
        if others:
            raise UserError("a template takes one plugin of ours; give it all strategies at once: as_plugin(a, b)")
        for strategy in self.strategies:
            if strategy.needs_evaluation:
                raise UserError(
                    f"strategy {strategy.name} follows measurements, which no Avalanche template makes; use cl run"
                )
        if getattr(template, "calls_our_hooks", False):
            return
        for hook in NEED_OUR_TEMPLATE:
            for strategy in self.hooked(hook):
                raise UserError(
                    f"strategy {strategy.name} acts at `{hook}`, for which Avalanche has no callback; use "
                    "cl.interop.avalanche.Template in place of SupervisedTemplate, or "
                    f"with_our_hooks({type(template).__name__})"
                )

    def _stream_of(self, template: Any) -> Stream:
        experience = template.experience
        if self._is_ours(template):
            return experience.stream
        if self.stream is not None:
            return self.stream
        benchmark = getattr(experience.origin_stream, "benchmark", None)
        return from_avalanche(experience.origin_stream if benchmark is None else benchmark)

    @staticmethod
    def _is_ours(template: Any) -> bool:
        """Whether batches arrive with the rows of ours they were made of."""
        return getattr(template, "calls_our_hooks", False) and isinstance(template.experience, OurExperience)

    def _optimizer(self, old: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        """Another optimizer of the kind and settings that the template was given, as the strategies want it."""

        def default(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            return type(old)(parameters, **old.defaults)

        makers = self.hooked("make_optimizer")
        return makers[-1].make_optimizer(model, default) if makers else default(model.parameters())

    # one experience

    def after_train_dataset_adaptation(self, template: Any, **kwargs: Any) -> None:
        """The strategies may have planned other data for this experience."""
        state, k = self.state, template.experience.current_experience
        if k >= len(state.stream.experiences):
            raise UserError(
                f"{self.strategies[0].name} plans {len(state.stream.experiences)} experiences; train on no more of them"
            )
        state.experience, state.epoch = state.stream.experiences[k], 0
        is_planned = bool(self.hooked("plan"))
        state.data = template.experience.data if self._is_ours(template) and not is_planned else state.experience.load()
        if is_planned:
            template.adapted_dataset = as_dataset(Rows(state.stream, state.data))
        self.adapted = template.adapted_dataset

    def before_training_exp(self, template: Any, **kwargs: Any) -> None:
        state = self.state
        state.optimizer = template.optimizer
        state.classes_seen += tuple(c for c in state.experience.classes if c not in state.classes_seen)
        for strategy in self.strategies:
            strategy.on_experience_start(state)
        # as the trainer does, after the strategies have looked at the network
        template.model.train()

    def before_training_epoch(self, template: Any, **kwargs: Any) -> None:
        self.state.epoch = template.clock.train_exp_epochs

    def after_training_exp(self, template: Any, **kwargs: Any) -> None:
        self.batch = self.output = None
        for strategy in self.strategies:
            strategy.on_experience_end(self.state)

    # one step

    def before_forward(self, template: Any, **kwargs: Any) -> None:
        batch = _rows(template, self.state)
        self.state.tokens += batch.targets.numel()
        self.state.step_rows = len(batch)
        for strategy in self.hooked("on_batch"):
            batch = strategy.on_batch(self.state, batch)
        self.batch = batch
        template.mbatch = minibatch(batch)
        announce(template.model, batch)

    def after_forward(self, template: Any, **kwargs: Any) -> None:
        self.state.count(forwards=len(self.batch), backwards=len(self.batch))
        self.output = last_output(template.model, template.mb_output)

    def before_backward(self, template: Any, **kwargs: Any) -> None:
        for strategy in self.hooked("penalty"):
            penalty = strategy.penalty(self.state, self.batch, self.output)
            if penalty is not None:
                template.loss = template.loss + penalty

    def after_backward(self, template: Any, **kwargs: Any) -> None:
        for strategy in self.hooked("on_gradients"):
            strategy.on_gradients(self.state)

    def step(self, update: Callable[[], Any]) -> None:
        """Called by `Template` in place of the optimizer step."""
        for strategy in reversed(self.hooked("step")):
            update = partial(strategy.step, self.state, self.batch, update)
        update()

    def after_update(self, template: Any, **kwargs: Any) -> None:
        committing = (m for m in self.state.model.modules() if isinstance(m, Backbone) and m.commits)
        commit_all(committing, [(self.batch, self.output)])
        self.state.step += 1
        batch, output = current_rows([(self.batch, self.output)])
        for strategy in self.hooked("on_step_end"):
            strategy.on_step_end(self.state, batch, output)
        self.output = None

    def _whole_loss(self, template: Any, batch: Batch) -> tuple[Output, dict[str, Tensor]]:
        """`TrainState.loss`: what the template would make of a batch that the strategies have prepared."""
        output = self.state.forward(batch)
        terms = {"cross_entropy": template._criterion.of_parts(output, batch)} | output.auxiliary
        for strategy in self.hooked("penalty"):
            penalty = strategy.penalty(self.state, batch, output)
            if penalty is not None:
                terms[strategy.name] = penalty
        return output, terms

    # measuring

    def after_eval_forward(self, template: Any, **kwargs: Any) -> None:
        if self.state is None or not self.hooked("eval_forward"):
            return
        batch = _rows(template, self.state)
        for strategy in self.strategies:
            output = strategy.eval_forward(self.state, batch)
            if output is not None:
                template.mb_output = output.logits
                return


class PartLoss:
    """The template's own criterion, taken over each part of a batch of ours and weighted; elsewhere as it was."""

    def __init__(self, plugin: OurPlugin, inner: Any) -> None:
        self.plugin, self.inner = plugin, inner

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        plugin = self.plugin
        if plugin.output is None or output is not plugin.output.logits:
            return self.inner(output, targets)
        return sum(plugin.output.auxiliary.values(), start=self.of_parts(plugin.output, plugin.batch))

    def of_parts(self, output: Output, batch: Batch) -> Tensor:
        """As `TrainState.label_loss`, with the template's criterion in place of the cross-entropy."""
        terms = [
            part.weight * self.inner(output.logits[part.rows], batch.targets[part.rows])
            for part in batch.parts
            if part.weight != 0
        ]
        return sum(terms[1:], start=terms[0]) if terms else output.logits.sum() * 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _rows(template: Any, state: TrainState) -> Batch:
    """The template's batch as one of ours; what it does not tell of its rows is left open."""
    mbatch = template.mbatch
    if isinstance(mbatch, Minibatch):
        return mbatch.rows
    inputs, targets = mbatch[0], mbatch[1]
    batch = rows_of(inputs, mbatch[-1] if state.info.num_heads > 1 else None, targets)
    batch.experience_id = torch.full_like(batch.experience_id, template.experience.current_experience)
    batch.raw = inputs
    return batch


def as_plugin(*strategies: Strategy, seed: int = 0, stream: Stream | None = None) -> OurPlugin:
    """Strategies of ours as a plugin for Avalanche's templates, composed in the order given.

    The template keeps its model, its optimizer and its criterion, which is taken over every part of a batch that the
    strategies extend. Hooks for which Avalanche has no callback (`step`, `make_optimizer`) need `Template`.

    Args:
        seed: of the strategies' own draws.
        stream: what the strategies may know of the benchmark; None reads it from the experiences' benchmark.

    Raises:
        UserError: while training starts, when a strategy cannot work on the benchmark or in the template.
    """
    return OurPlugin(strategies, seed, stream)
