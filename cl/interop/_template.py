"""Avalanche's training template with the hooks it lacks, and rows in our order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from cl.core import Data, Experience, Stream, StreamInfo
from cl.hooks import Strategy
from cl.interop._benchmark import Minibatch, OurExperience, as_benchmark, minibatch
from cl.interop._fetch import fast_fetching, same_rows
from cl.interop._network import as_model
from cl.interop._plugin import OurPlugin, as_plugin
from cl.interop._quiet import quiet
from cl.loader import Budget, steps_from
from cl.seeding import Seeds, derive_seed
from cl.state import TrainState

with quiet():
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.templates import SupervisedTemplate


class OurLoader:
    """Batches of one experience of ours, in the order in which our own loop trains on them.

    Each time it is iterated is one epoch.

    Args:
        drop_last: leave out a last batch that is not full.
    """

    def __init__(
        self, state: TrainState, experience: Experience, data: Data, batch_size: int, drop_last: bool = False
    ) -> None:
        self.state, self.experience, self.data = state, experience, data
        self.batch_size, self.drop_last, self.epoch = batch_size, drop_last, 0

    def __len__(self) -> int:
        return len(self.data) // self.batch_size if self.drop_last else -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[Minibatch]:
        budget = Budget(epochs=self.epoch + 1, batch_size=self.batch_size)
        first = self.epoch * budget.steps_per_epoch(len(self.data))
        self.epoch += 1
        for _, (batch,) in steps_from(self.state, self.experience, self.data, budget, first):
            if not self.drop_last or len(batch) == self.batch_size:
                yield minibatch(batch)


class MeasuredRows:
    """Batches of the first rows of one set of ours, in their order, as the network reads them."""

    def __init__(self, experience: OurExperience, num_rows: int, batch_size: int) -> None:
        self.experience, self.num_rows, self.batch_size = experience, num_rows, batch_size

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Minibatch]:
        here = self.experience
        for index in torch.arange(self.num_rows).split(self.batch_size):
            yield minibatch(here.stream.prepare(here.data.rows(index)))


class OurHooks:
    """Mixin before a template: calls the hooks that have no callback, and takes rows in our order from our streams.

    `order_state` is the state whose seeds decide the order where no strategy of ours is in the template; without any,
    and where a plugin has put other rows in place, the template's own loader is used.
    """

    calls_our_hooks = True
    order_state: TrainState | None = None

    @property
    def our_plugin(self) -> OurPlugin | None:
        return next((p for p in self.plugins if isinstance(p, OurPlugin)), None)  # type: ignore[attr-defined]

    def make_train_dataloader(self, **kwargs: Any) -> None:
        plugin, here = self.our_plugin, self.experience  # type: ignore[attr-defined]
        state = plugin.state if plugin else self.order_state
        if state is None or not isinstance(here, OurExperience) or not self._has_own_rows(plugin):
            super().make_train_dataloader(**kwargs)  # type: ignore[misc]
            return
        source, data = (here.source, here.data) if plugin is None else (state.experience, state.data)
        self.dataloader = OurLoader(  # type: ignore[attr-defined]
            state, source, data, self.train_mb_size, kwargs.get("drop_last", False)
        )

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        here = self.experience  # type: ignore[attr-defined]
        adapted = self.adapted_dataset  # type: ignore[attr-defined]
        if isinstance(here, OurExperience) and same_rows(adapted, here.dataset):
            # theirs first lists every row of the data set, to look for a reader it does not have
            self.dataloader = MeasuredRows(here, len(adapted), self.eval_mb_size)  # type: ignore[attr-defined]
        else:
            super().make_eval_dataloader(**kwargs)  # type: ignore[misc]

    def _has_own_rows(self, plugin: OurPlugin | None) -> bool:
        adapted = self.adapted_dataset  # type: ignore[attr-defined]
        if plugin is not None:
            return adapted is plugin.adapted
        return same_rows(adapted, self.experience.dataset)  # type: ignore[attr-defined]

    def make_optimizer(self, **kwargs: Any) -> None:
        plugin = self.our_plugin
        if plugin is None or not plugin.owns_optimizer:
            super().make_optimizer(**kwargs)  # type: ignore[misc]
        else:
            # not None any more: Avalanche would put every parameter into the optimizer
            self.optimized_param_id = dict(self.model.named_parameters())  # type: ignore[attr-defined]

    def optimizer_step(self) -> None:
        plugin = self.our_plugin
        if plugin is None:
            super().optimizer_step()  # type: ignore[misc]
        else:
            plugin.step(super().optimizer_step)  # type: ignore[misc]


@cache
def with_our_hooks(template: type) -> type:
    """A subclass of a template of Avalanche in which every hook of ours is called."""
    return type(template.__name__, (OurHooks, template), {"__module__": __name__, "__doc__": template.__doc__})


Template = with_our_hooks(SupervisedTemplate)
"""`SupervisedTemplate` in which every hook of our strategies is called."""


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators as if freshly seeded; what they were comes back."""
    before = random.getstate(), np.random.get_state()
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % (1 << 32))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def train_in_template(
    stream: Stream,
    backbone: Callable[[StreamInfo], nn.Module],
    strategies: Sequence[Strategy],
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    epochs: int = 1,
    batch_size: int = 64,
    seed: int = 0,
) -> Any:
    """Train strategies of ours on a stream of ours inside Avalanche's template, with the draws of our own loop.

    Returns:
        the template after training; its model shares the weights of the backbone.

    Cost: the overhead of Avalanche's callbacks over `cl.trainer`, about a tenth of a small network's step.
    """
    seeds = Seeds(seed)
    plugin = as_plugin(*strategies, seed=seed, stream=stream)
    with seeds.as_global("init"):
        model = as_model(backbone(stream.info), stream.info.num_heads)
        plugin.random_state = torch.get_rng_state()
    with quiet(), fast_fetching(), seeds.as_global("torch"):
        template = Template(
            model=model,
            optimizer=optimizer(model.parameters()),
            train_mb_size=batch_size,
            train_epochs=epochs,
            plugins=[plugin],
            evaluator=EvaluationPlugin(),
        )
        for k, experience in enumerate(as_benchmark(stream).train_stream):
            planned = template.our_plugin.state
            if planned is None or k < len(planned.stream.experiences):
                template.train(experience, eval_streams=[])
    return template
