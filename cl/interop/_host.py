"""Runs a strategy of Avalanche in its own template, with everything around the loop ours."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import GeneratorType
from typing import Any

import numpy as np
import torch

from cl.config import is_due
from cl.core import Data, Experience, Stream, UserError
from cl.evaluation import Evaluator
from cl.hooks import Strategy
from cl.interop import _recipes
from cl.interop._benchmark import OurExperience, OurStream, Rows, as_benchmark
from cl.interop._bridge import Bridge, Learner, Tally
from cl.interop._fetch import bytes_in, fast_fetching
from cl.interop._network import counting
from cl.interop._quiet import quiet
from cl.interop._repairs import repaired
from cl.interop._snapshot import again, classes_in, read, write
from cl.interop._template import seeded_globals, with_our_hooks
from cl.interop._theirs import Theirs
from cl.result import Result
from cl.trainer import Trainer

PASSING = ("experience", "dataloader", "mbatch", "mb_output", "adapted_dataset", "loss", "current_eval_stream")
"""Attributes of a template that mean something inside `train` and `eval` only."""


class _Stopped(Exception):
    """The run was asked to stop inside an experience."""


class HostingTrainer(Trainer):
    """`Trainer` whose experiences are trained on by a template of Avalanche; it resumes at their boundaries."""

    def __init__(self, stream: Stream, backbone: Any, strategies: Sequence[Strategy], **options: Any) -> None:
        super().__init__(stream, backbone, strategies, **options)
        self._refuse_settings()
        self.evaluator = _Evaluator(self.state, self.config, self.ledger, self.strategies)
        self.host = strategies[0].host = Host(self, strategies[0], stream)

    def compose(self, strategies: Sequence[Strategy]) -> None:
        if len(strategies) != 1:
            names = ", ".join(strategy.name or type(strategy).__name__ for strategy in strategies)
            raise UserError(
                f"a strategy of Avalanche runs Avalanche's loop alone: it is neither composed nor explained ({names}); "
                "to use one of ours in that loop see cl.interop.avalanche.as_plugin"
            )
        super().compose(strategies)

    def _refuse_settings(self) -> None:
        config = self.config
        if isinstance(config.max_steps, list | tuple):
            raise UserError(
                "trainer.max_steps is a list, and Avalanche's template gives every experience as many steps"
            )
        for name, wanted in (
            ("accumulation", 1),
            ("precision", "fp32"),
            ("checkpoint_every", 0),
            ("logit_mask", "none"),
        ):
            value = getattr(config, name, wanted)
            if value != wanted:
                raise UserError(
                    f"trainer.{name} is {value!r}; in Avalanche's template it must be {wanted!r}, "
                    "since the loop is theirs"
                )

    def run(self, resume: bool = False) -> Result:
        with seeded_globals(self.state.seeds.root), quiet(), fast_fetching(), repaired():
            return super().run(resume)

    def _learn(self, experience: Experience, steps_done: int) -> bool:
        """As the trainer's own, with Avalanche's loop in the middle."""
        state, ledger = self.state, self.ledger
        state.experience = experience
        state.classes_seen += tuple(c for c in experience.classes if c not in state.classes_seen)
        num_steps = self.config.budget.steps(experience.num_samples)
        ledger.tell("on_experience_start", state, num_steps)
        try:
            with ledger.charged("train_s"):
                self.host.train(experience.id, num_steps)
        except _Stopped:
            return False
        ledger.flush(state)
        ledger.result.R.append(self.evaluator.row())
        self.keeper.save(experience.id + 1, 0)
        ledger.tell("on_evaluation", state, ledger.result)
        return not self._stop_requested or experience is state.stream.experiences[-1]

    def before_step(self, step: int, num_steps: int) -> float:
        return self._set_learning_rate(step)

    def after_step(self, step: int, num_steps: int, loss: Any, lr: float) -> None:
        """Books of one step, and what is due after it."""
        state, ledger = self.state, self.ledger
        ledger.watch(state, {"criterion": torch.as_tensor(loss).detach().sum()}, lr)
        state.step += 1
        if self._stop_requested:
            raise _Stopped
        if step + 1 < num_steps and is_due(self.config.eval_every, step + 1):
            begin = time.perf_counter()
            self.evaluator.within()
            ledger.clock["train_s"] -= time.perf_counter() - begin


class Host:
    """A template of Avalanche on a stream of ours, and its state.

    Args:
        stream: as it was before the strategy planned it.
    """

    def __init__(self, trainer: HostingTrainer, strategy: Theirs, stream: Stream) -> None:
        self.trainer, self.strategy, self.stream = trainer, strategy, stream
        config, state = trainer.config, trainer.state
        self.benchmark = as_benchmark(stream, config.eval_rows)
        with quiet():
            self.bridge, self.tally = Bridge(trainer), Tally()
        kind = strategy.kind if strategy.method.recipe == "plugin" else with_our_hooks(strategy.kind)
        common = {
            "train_mb_size": config.batch_size,
            "train_epochs": config.epochs or 1,
            "eval_mb_size": config.eval_batch_size,
            "device": state.device,
            "plugins": [self.bridge],
            "evaluator": self.tally,
        }
        options = dict(strategy.method.given) | strategy.options
        name = type(strategy).__name__
        parts = _recipes.Parts(name, kind, state.model, stream.info, trainer.optimizer, common, options)
        try:
            with quiet(), state.seeds.as_global("init", "avalanche"), seeded_globals(state.seeds.root):
                self.template = getattr(_recipes, strategy.method.recipe)(parts)
        except UserError:
            raise
        except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"strategy avalanche/{name} cannot be made: {str(error) or type(error).__name__}"
            ) from error
        self.template.order_state = state
        state.model = Learner(self.template.model)
        self.put_in_place()

    def put_in_place(self) -> None:
        """The run's state names what the template uses now; templates grow and replace networks."""
        state, template = self.trainer.state, self.template
        state.model.model = template.model
        if template.optimizer is not None:
            state.optimizer = template.optimizer

    def train(self, k: int, num_steps: int) -> None:
        """One experience, or the whole stream where the strategy wants it at once."""
        template, config, bridge = self.template, self.trainer.config, self.bridge
        bridge.step, bridge.num_steps = 0, num_steps
        if config.max_steps is not None or config.max_tokens is not None:
            per_epoch = config.budget.steps_per_epoch(self.trainer.state.stream.experiences[k].num_samples)
            template.train_epochs = -(-num_steps // per_epoch)
        if config.reset_optimizer and k > 0:
            template.optimizer.state = defaultdict(dict)
        is_joint = self.strategy.method.recipe == "joint"
        with counting(self.trainer.state.count):
            template.train(self.benchmark.train_stream if is_joint else self.benchmark.train_stream[k], eval_streams=[])
        self.put_in_place()

    def measure(self, j: int, max_rows: int | None) -> tuple[float, int]:
        """Accuracy on a domain, and how many rows it was taken on."""
        stream: OurStream = self.benchmark.test_stream
        if stream.num_rows != max_rows:
            stream.num_rows = max_rows
            stream._made.clear()
        self.tally.right = self.tally.rows = 0
        with self._unread_generators():
            self.template.eval([stream[j]])
        return self.tally.right / self.tally.rows, self.tally.rows

    @contextmanager
    def _unread_generators(self) -> Iterator[None]:
        """Measuring must not draw from a memory, as strategies do whose criterion replays."""
        held = {key: each for key, each in vars(self.template).items() if isinstance(each, GeneratorType)}
        vars(self.template).update({key: again(each) for key, each in held.items()})
        try:
            yield
        finally:
            vars(self.template).update(held)

    def kept_bytes(self) -> int:
        """What plugins and the template keep beside the network and its optimizer, stored rows included."""
        template = self.template
        shared = [*template.model.parameters(), *template.model.buffers()]
        skipped = {id(thing) for thing in (template.model, template.optimizer, *shared)}
        row_bytes = 4 * math.prod(self.stream.info.input_shape) + 8
        return bytes_in(
            {k: v for k, v in vars(template).items() if k not in PASSING}, row_bytes, skipped, self._name_of
        )

    # resume

    def state_dict(self) -> dict[str, Any]:
        passing = (*PASSING, *self.strategy.method.remade)
        root = {key: value for key, value in vars(self.template).items() if key not in passing}
        kind, keys, *rest = np.random.get_state()
        version, words, gauss = random.getstate()
        return {
            "template": write(root, self._name_of),
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
            "python": [version, torch.tensor(words), gauss],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        fresh = vars(self.template)
        known = {cls for cls in classes_in(dict(fresh)) if not issubclass(cls, type(self.trainer))}
        found = read(saved["template"], fresh, self._named, known, self.trainer.state.device)
        fresh.update(found)
        kind, keys, *rest = saved["numpy"]
        np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
        version, words, gauss = saved["python"]
        random.setstate((version, tuple(words.tolist()), gauss))

    def _name_of(self, thing: Any) -> str | None:
        """Objects that belong to the run: they are rebuilt from its config, not from a checkpoint."""
        for name in ("trainer", "bridge", "tally", "benchmark", "stream", "strategy"):
            if thing is getattr(self, name):
                return name
        if thing is self.trainer.state:
            return "state"
        if isinstance(thing, OurExperience):
            return f"experience/{thing.origin_stream.name}/{thing.current_experience}"
        if isinstance(thing, Rows):
            return f"rows/{thing.place}"
        return None

    def _named(self, name: str) -> Any:
        kind, _, place = name.partition("/")
        if kind == "rows":
            part, k = place.split("/")
            return getattr(self.benchmark, f"{part}_stream").rows(int(k))
        if kind == "experience":
            part, k = place.split("/")
            return getattr(self.benchmark, f"{part}_stream")[int(k)]
        return self.trainer.state if kind == "state" else getattr(self, kind)


class _Evaluator(Evaluator):
    """Fills R through the template's own evaluation loop, in which plugins may change the answer."""

    def _measured(self, columns: Sequence[int], max_rows: int | None, extra: Any = None) -> list[float | None]:
        host = self.strategies[0].host
        row: list[float | None] = [None] * len(self.state.stream.eval_sets)
        if host.strategy.method.needs_past:
            seen = set() if not self.state.step else set(self._seen())
            columns = [j for j in columns if j in seen]
        with self.ledger.charged("eval_s"), _without_trace():
            for j in columns:
                row[j], num_rows = host.measure(j, max_rows)
                self.ledger.clock["eval_tokens"] += num_rows
        return row


@contextmanager
def _without_trace() -> Iterator[None]:
    """Random states as found."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])


def as_one_experience(stream: Stream) -> Stream:
    """The stream as its table of results sees it when everything is trained on at once."""
    experiences = list(stream.experiences)
    whole = Experience(
        id=0,
        name="all experiences",
        domain="all experiences",
        load=_not_ours,
        num_samples=sum(experience.num_samples for experience in experiences),
        classes=tuple(dict.fromkeys(c for experience in experiences for c in experience.classes)),
    )
    return replace(stream, info=replace(stream.info, num_experiences=1), experiences=[whole])


def _not_ours() -> Data:
    raise AssertionError("Avalanche joins the rows itself")
