"""The verbs of a strategy: the hooks that the training loop calls, and the state it hands to them.

A strategy overrides only the hooks it needs; the loop skips the others. Strategies compose in the order given: each
sees the batch that the one before returned, penalties add up, and `step` calls nest, the first strategy outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from cl.core import Batch, Output, Setting, Stream, StreamInfo, UserError
from cl.state import Cost, TrainState

ALL_SETTINGS = frozenset({Setting.TASK_INCREMENTAL, Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL})


@dataclass(frozen=True)
class Contract:
    """What the contract suite (`cl.testing`) must know of a strategy.

    Args:
        toy: arguments for the two-second toy stream.
        zero: arguments under which the strategy must equal naive training bit for bit; None where it has no such
            setting, and then `why_not_zero` says why.
        forgets_less_by: margin by which `forgetting_first` on the toy stream must beat naive, averaged over the
            settings it declares; None where it does not have to, and then `why_not_better` says why.
        acts_at_once: it changes the first step already, when nothing is known of a past.
        why_not_cut: why a step differs when `trainer.accumulation` cuts it into micro-batches; nobody else's may.
    """

    toy: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] | None = None
    why_not_zero: str = ""
    forgets_less_by: float | None = None
    why_not_better: str = ""
    acts_at_once: bool = False
    why_not_cut: str = ""


class Strategy:
    """Base of every strategy: all hooks, each doing nothing.

    Class attributes:
        settings: where the strategy makes sense.
        contract: parameters of the shipped contract tests.
        parallel: wrappers ("ddp", "fsdp") under which it computes in several processes what it computes in one. Every
            process calls `on_batch` and `on_step_end` with the whole batch, and with the same generators; the model
            sees a share of the rows, and `on_step_end` no logits: `World.joined` puts those of all shares together. A
            `penalty` that is a mean over rows is multiplied by their `Part.share`. Under "fsdp" parameters and
            gradients are shards. Not inherited.
        moves_weights: it changes weights outside of the loop's steps too, by training, undoing or merging of its own.
            Strategies that must keep weights as they are refuse to stand beside it.
    """

    settings: ClassVar[frozenset[Setting]] = ALL_SETTINGS
    contract: ClassVar[Contract] = Contract()
    parallel: ClassVar[frozenset[str]] = frozenset()
    moves_weights: ClassVar[bool] = False

    name: str = ""
    """Tag of its batch parts, its penalty and its generator: the file name, or the config node it was made from."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rsplit(".", 1)[-1]
        # what holds for a strategy need not hold for one that is built on it
        cls.parallel = cls.__dict__.get("parallel", frozenset())

    # before training

    def check(self, stream: Stream) -> None:
        """Raise `UserError` when this strategy cannot work on this stream."""

    def check_beside(self, strategies: Sequence[Strategy]) -> None:
        """Raise `UserError` when this strategy cannot work with the others of the run, or in their order."""

    def plan(self, stream: Stream) -> Stream:
        """Which data each experience trains on."""
        return stream

    def wrap(self, backbone: nn.Module, info: StreamInfo) -> nn.Module:
        """Put something around the backbone: a hypernetwork, adapters, masks."""
        return backbone

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        """Raise `UserError` when this strategy cannot work with the network, which all strategies have wrapped."""

    def make_optimizer(self, module: nn.Module, default: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Optimizer:
        """Build the optimizer; only the last strategy that overrides this is asked."""
        return default(module.parameters())

    # as named

    def on_run_start(self, state: TrainState) -> None: ...

    def on_resume(self, state: TrainState) -> None:
        """A stopped run goes on: called in place of `on_run_start`, after `load_state_dict` and before the model's
        weights are loaded, so that what the weights belong to can be put in place."""

    def on_experience_start(self, state: TrainState) -> None: ...

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        """Before the forward pass: add rows."""
        return batch

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        """After the forward pass: a scalar that the loop adds to the loss and logs under the strategy's name.

        Asked again for the same batch when another strategy needs the whole loss (`TrainState.loss`), so it must not
        change anything.
        """
        return None

    def on_gradients(self, state: TrainState) -> None:
        """After backward and unscaling, before clipping: edit `p.grad` in place.

        Neither this nor `step` is called where float16 gradients overflowed (`trainer.precision=fp16`): such a step
        updates nothing. A gradient of one's own is taken by `state.gradients`, so that it lies beside `p.grad`.
        """

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        """Around the optimizer step; must call `update` exactly once."""
        update()

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        """After the step, with the current rows only (all micro-batches of the step) and their output before it."""

    def on_experience_end(self, state: TrainState) -> None: ...

    def on_evaluation(self, state: TrainState, row: Sequence[float | None], max_rows: int | None) -> None:
        """After every measurement inside an experience and at its end (there after `on_experience_end`), before the
        checkpoint that goes with it.

        Args:
            row: the measure on every domain; None where it was not measured.
            max_rows: rows per domain that it was taken on, None for all; values compare at equal numbers only.
        """

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        """Predict in place of the model; None leaves it to the next strategy, and at last to the model."""
        return None

    def settle(self, state: TrainState) -> None:
        """The network leaves the run (`cl export`): put into its weights what `eval_forward` answers with."""

    @property
    def needs_evaluation(self) -> bool:
        """Whether training depends on what `on_evaluation` is told, so that only our own loop can run it."""
        return False

    @property
    def seals(self) -> str:
        """What it does when an experience ends, if that experience cannot be trained on any longer then: the end of a
        sentence that `cl extend` says, such as "merged its factors"."""
        return ""

    # what it costs and keeps

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        """Declared extra rows of the *next* step over plain training, and the bytes kept now.

        Args:
            batch_size: rows of the stream in that step, all micro-batches together.
        """
        return Cost()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only: checkpoints load with `weights_only=True`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint holds {sorted(state)}")


def check_all(strategies: Sequence[Strategy], stream: Stream) -> None:
    """Whether the strategies can work on the stream, and together.

    Raises:
        UserError: a setting that a strategy does not declare, one name twice, or what a strategy's own checks find.
    """
    names = [strategy.name for strategy in strategies]
    for strategy in strategies:
        if names.count(strategy.name) > 1:
            # parts, penalties and generators are told apart by it
            raise UserError(f"two strategies are named {strategy.name!r}; give one of them another `name`")
        if stream.info.setting not in strategy.settings:
            raise UserError(
                f"strategy {strategy.name} does not work in the setting {stream.info.setting} of stream "
                f"{stream.info.name}; it must be one of {', '.join(sorted(strategy.settings))}"
            )
        strategy.check(stream)
        strategy.check_beside(strategies)


def overrides(strategy: Strategy, hook: str) -> bool:
    """Whether a strategy does anything at `hook`; lets the loop skip what would do nothing."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)
