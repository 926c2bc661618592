"""How strategies are called: who, in which order, and when they are refused."""

from functools import partial

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Setting, Source, UserError
from cl.hooks import Strategy, check_all, overrides
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer

SETTING = Setting.DOMAIN_INCREMENTAL


class Scribe(Strategy):
    """Writes down every call in a shared list."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def _note(self, hook):
        self.calls.append(f"{self.name}.{hook}")

    def plan(self, stream):
        self._note("plan")
        return stream

    def wrap(self, backbone, info):
        self._note("wrap")
        return backbone

    def on_run_start(self, state):
        self._note("on_run_start")

    def on_experience_start(self, state):
        self._note("on_experience_start")

    def on_batch(self, state, batch):
        self._note("on_batch")
        return batch

    def penalty(self, state, batch, output):
        self._note("penalty")

    def on_gradients(self, state):
        self._note("on_gradients")

    def step(self, state, batch, update):
        self._note("step begins")
        update()
        self._note("step ends")

    def on_step_end(self, state, batch, output):
        self._note("on_step_end")

    def on_experience_end(self, state):
        self._note("on_experience_end")


def run(strategies, num_experiences=1, **config):
    config = {"max_steps": 1, "batch_size": 8, "device": "cpu", **config}
    trainer = Trainer(
        toy_stream(SETTING).first(num_experiences),
        ToyNet,
        strategies,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(**config),
    )
    trainer.run()
    return trainer


def test_hooks_are_called_in_the_documented_order():
    calls = []
    run([Scribe("a", calls), Scribe("b", calls)])
    assert calls == [
        "a.plan",
        "b.plan",
        "a.wrap",
        "b.wrap",
        "a.on_run_start",
        "b.on_run_start",
        "a.on_experience_start",
        "b.on_experience_start",
        "a.on_batch",
        "b.on_batch",
        "a.penalty",
        "b.penalty",
        "a.on_gradients",
        "b.on_gradients",
        "a.step begins",
        "b.step begins",
        "b.step ends",
        "a.step ends",
        "a.on_step_end",
        "b.on_step_end",
        "a.on_experience_end",
        "b.on_experience_end",
    ]


def test_micro_batches_repeat_what_comes_before_the_update_only():
    calls = []
    run([Scribe("a", calls)], accumulation=3)
    step = [call.removeprefix("a.") for call in calls[calls.index("a.on_batch") :]]
    assert step == [
        *["on_batch", "penalty"] * 3,
        "on_gradients",
        "step begins",
        "step ends",
        "on_step_end",
        "on_experience_end",
    ]


class Adder(Strategy):
    """Adds the last current row again."""

    def __init__(self, name):
        self.name = name
        self.seen, self.ended = [], []

    def on_batch(self, state, batch):
        self.seen.append([part.owner for part in batch.parts])
        return batch.extended(batch.current()[-1:], Source.REPLAY, self.name)

    def on_step_end(self, state, batch, output):
        lengths = (len(batch), len(output.logits), len(output.hidden))
        self.ended.append((lengths, output.logits.requires_grad, batch.parts[0].source))


def test_each_sees_the_batch_of_the_one_before_and_at_the_end_the_current_rows():
    first, second = Adder("first"), Adder("second")
    run([first, second], accumulation=2)
    assert first.seen == [["stream"]] * 2
    assert second.seen == [["stream", "first"]] * 2
    assert first.ended == second.ended == [((16, 16, 16), False, Source.CURRENT)]


class Pusher(Strategy):
    """A penalty of known size."""

    def __init__(self, name, amount):
        self.name, self.amount = name, amount

    def penalty(self, state, batch, output):
        return output.logits.new_tensor(self.amount)


def test_penalties_add_up_and_keep_their_names():
    from cl.observe import Observer

    class Listener(Observer):
        def on_step(self, state, losses, lr):
            self.losses = losses

    listener = Listener()
    trainer = Trainer(
        toy_stream(SETTING).first(1),
        ToyNet,
        [Pusher("a", 1.5), Pusher("b", 0.25)],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(max_steps=1, device="cpu"),
        observers=[listener],
    )
    trainer.run()
    losses = listener.losses
    assert list(losses) == ["loss", "cross_entropy", "a", "b"]
    assert (losses["a"], losses["b"]) == (1.5, 0.25)
    assert losses["loss"] == pytest.approx(losses["cross_entropy"] + 1.75)


class OwnOptimizer(Strategy):
    """Asks for an optimizer of its own."""

    def __init__(self, name, lr):
        self.name, self.lr = name, lr

    def make_optimizer(self, module, default):
        return torch.optim.Adam(module.parameters(), lr=self.lr)


def test_the_last_optimizer_maker_is_asked():
    optimizer = run([OwnOptimizer("a", 0.5), OwnOptimizer("b", 0.25), Scribe("c", [])]).state.optimizer
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["initial_lr"] == 0.25


class TextOnly(Strategy):
    """Works nowhere but on text."""

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})


def test_a_setting_that_is_not_declared_is_refused():
    with pytest.raises(UserError, match=r"test_hooks does not work in the setting domain_.*continual_pre"):
        check_all([TextOnly()], toy_stream(SETTING))


def test_two_of_one_name_are_refused():
    """Their penalties, parts and generators would be taken for each other's."""
    with pytest.raises(UserError, match="two strategies are named 'a'"):
        check_all([Pusher("a", 1.0), Pusher("a", 2.0)], toy_stream(SETTING))


def test_a_strategy_may_refuse_a_stream():
    class Picky(Strategy):
        def check(self, stream):
            raise UserError(f"not on {stream.info.name}")

    with pytest.raises(UserError, match="not on toy_domain_incremental"):
        run([Picky()])


def test_the_name_is_the_file_name_until_a_config_node_gives_another():
    assert TextOnly.name == TextOnly().name == "test_hooks"
    named = TextOnly()
    named.name = "node"
    assert (named.name, TextOnly().name) == ("node", "test_hooks")


def test_what_a_strategy_declares_of_several_processes_is_not_inherited():
    class Parallel(Strategy):
        parallel = frozenset({"ddp"})

    class Derived(Parallel):
        pass

    assert Parallel.parallel == {"ddp"} and Derived.parallel == Strategy.parallel == frozenset()


def test_hooks_of_the_base_may_be_called_on():
    """As `super().step(...)` does it: the update is made once, the batch and the stream stay what they are."""
    calls, base = [], Strategy()
    base.step(None, None, lambda: calls.append("update"))
    assert calls == ["update"]
    batch, stream = object(), object()
    assert base.on_batch(None, batch) is batch and base.plan(stream) is stream and base.wrap(batch, None) is batch


def test_a_strategy_may_refuse_the_others_or_their_order():
    class First(Strategy):
        def check_beside(self, strategies):
            if strategies[0] is not self:
                raise UserError(f"not behind {strategies[0].name}")

    check_all([First(), Pusher("a", 1.0)], toy_stream(SETTING))
    with pytest.raises(UserError, match="not behind a"):
        check_all([Pusher("a", 1.0), First()], toy_stream(SETTING))


def test_hooks_that_are_not_overridden_are_known():
    assert overrides(Pusher("a", 1.0), "penalty")
    assert not overrides(Pusher("a", 1.0), "on_batch")


def test_state_nobody_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"keeps no state, but the checkpoint holds \['x'\]"):
        TextOnly().load_state_dict({"x": 1})
    TextOnly().load_state_dict({})
