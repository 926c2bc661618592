"""Float16 on the CPU, where autocast and loss scaling work as on a GPU: against float32, and where it overflows."""

import math
from functools import partial

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Output, Setting
from cl.hooks import Strategy
from cl.ledger import NonFiniteLoss
from cl.observe import Observer
from cl.scaling import LossScaler
from cl.schedules import cosine
from cl.testing import ToyNet, equal, toy_stream
from cl.trainer import Trainer
from strategies.agem import Agem
from strategies.fpf import Fpf
from strategies.gem import Gem
from strategies.locas import Locas
from strategies.refresh import Refresh
from strategies.si import Si
from strategies.trace_replay import TraceReplay
from strategies.update_periods import UpdatePeriods

STEPS = 8
"""Of each of three experiences."""


class Quiet(ToyNet):
    """Its gradients are a millionth, which float16 rounds to nothing."""

    times = 1e-6

    def forward(self, batch):
        output = super().forward(batch)
        return Output(output.logits * self.times, hidden=output.hidden)


class Loud(Quiet):
    """Its gradients, scaled, are more than float16 holds; the scale falls until they fit."""

    times = 30.0


class Rates(Observer):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_step(self, state, losses, lr):
        self.losses.append(losses["loss"])
        self.rates.append(lr)


class Calls(Strategy):
    """Norms of the gradients that `step` finds, and what the other hooks were told."""

    def __init__(self):
        self.norms, self.ends = [], []

    def step(self, state, batch, update):
        grads = [p.grad.flatten() for p in state.parameters().values()]
        self.norms.append(torch.cat(grads).norm().item())
        update()

    def on_step_end(self, state, batch, output):
        self.ends.append(state.step)


def made(strategies=(), precision="fp16", backbone=ToyNet, lr=0.1, run_dir=None, **config):
    torch.set_num_threads(1)
    return Trainer(
        toy_stream(Setting.DOMAIN_INCREMENTAL),
        backbone,
        strategies,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.5),
        schedule=cosine,
        config=TrainerConfig(
            **({"max_steps": STEPS, "batch_size": 16, "device": "cpu", "precision": precision} | config)
        ),
        run_dir=run_dir,
        observers=[Rates()],
    )


def run(*args, resume=False, **options):
    trainer = made(*args, **options)
    return trainer.run(resume), trainer, trainer.ledger.observers[0]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()])


def movement(strategy, precision):
    """What training with a strategy did to the weights of the quiet network."""
    trainer = made([strategy], precision, Quiet, lr=3e4)
    before = weights(trainer)
    trainer.run()
    return weights(trainer) - before


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"accumulation": 2}], ids=str)
def test_float16_learns_what_float32_learns(options):
    (whole, _, full), (half, trainer, found) = run(precision="fp32", **options), run(**options)
    assert found.losses != full.losses
    assert found.losses == pytest.approx(full.losses, abs=0.01)
    assert torch.tensor(half.R) == pytest.approx(torch.tensor(whole.R), abs=0.05)
    assert {tensor.dtype for tensor in trainer.state.model.state_dict().values()} == {torch.float32}
    assert not half.traces, "nothing overflowed"


def test_gradients_have_their_own_size_in_every_hook():
    full, half = Calls(), Calls()
    run([full], precision="fp32")
    run([half])
    assert half.norms == pytest.approx(full.norms, rel=0.02)


@pytest.mark.parametrize(
    "strategy",
    [
        partial(Agem, capacity=30, replay_batch_size=30),
        partial(Gem, capacity=30),
        partial(Refresh, delta=0.05, noise=0.0),
        partial(Fpf, modules="all", capacity=40, steps=5, lr=3e4),
        partial(TraceReplay, rate=50.0),
        partial(Locas, rank=2, rows=16, step=1e4),
        partial(Si, strength=1e-4),
        partial(UpdatePeriods, {"first.*": 3}),
    ],
    ids=lambda made: made.func.__name__,
)
def test_small_gradients_of_strategies_are_not_lost(strategy):
    full, half = (movement(strategy(), precision) for precision in ("fp32", "fp16"))
    assert float((half - full).norm() / full.norm()) < 0.05


# overflow


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_overflows_updates_nothing_and_is_counted(accumulation):
    calls = Calls()
    result, trainer, found = run([calls], backbone=Loud, lr=1e-6, accumulation=accumulation)
    _, _, full = run(precision="fp32", backbone=Loud, lr=1e-6, accumulation=accumulation)
    scales = [(step, value) for name, step, value in result.traces if name == "loss_scale"]
    skipped = len(scales)
    assert 0 < skipped < STEPS
    assert scales[0] == (0, 2.0**16) and [value for _, value in scales] == [2.0 ** (16 - k) for k in range(skipped)]
    assert trainer.state.scaler.get_scale() == 2.0 ** (16 - skipped)
    # hooks that act on gradients were not called, all others were
    assert len(calls.norms) == 3 * STEPS - skipped and all(map(math.isfinite, calls.norms))
    assert calls.ends == list(range(1, 3 * STEPS + 1))
    assert found.rates == full.rates, "the schedule follows the rows"
    assert result.status == "done" and trainer.state.step == 3 * STEPS


@pytest.mark.parametrize(
    "strategy", [partial(Gem, capacity=30), partial(Agem, capacity=30), partial(Refresh, noise=0.0), Si], ids=str
)
def test_strategies_do_not_see_an_overflow(strategy):
    """Also one in the second experience, where there are stored rows."""
    trainer = made([strategy()], backbone=Loud, lr=1e-6)

    class Raise(Strategy):
        def on_batch(self, state, batch):
            if state.step == STEPS + 2:
                state.scaler.update(2.0**30)
            return batch

    trainer.compose([*trainer.strategies, Raise()])
    result = trainer.run()
    late = [step for name, step, _ in result.traces if name == "loss_scale" and step >= STEPS]
    assert late[0] == STEPS + 2 and result.status == "done"
    assert weights(trainer).isfinite().all()


def test_gathered_gradients_outlive_an_overflow():
    """At the end of a period: what was gathered waits for the next one."""
    trainer = made([UpdatePeriods({"first.*": 4})], max_steps=4)

    class Raise(Strategy):
        def on_batch(self, state, batch):
            if state.step == 3:
                state.scaler.update(2.0**40)
            return batch

        def on_step_end(self, state, batch, output):
            if state.step == 4:
                self.kept = set(state.strategies[0].gathered)

    watch = Raise()
    trainer.compose([*trainer.strategies, watch])
    trainer.run()
    assert watch.kept == {"first.weight", "first.bias"}


@pytest.mark.parametrize("at", [1, 3], ids=["inside", "at the end"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_period_has_as_many_gradients_after_an_overflow(at, reduce):
    """Of four steps, of which one overflows: the next one is the fourth that counts."""
    trainer, seen, steps = made([UpdatePeriods({"first.*": 4}, reduce)], max_steps=6), [], []

    class Watch(Strategy):
        def on_batch(self, state, batch):
            if state.step in (at, at + 1):
                state.scaler.update(2.0 ** (40 if state.step == at else 16))
            return batch

        def on_gradients(self, state):
            seen.append((state.step, state.model.first.weight.grad.double()))

        def step(self, state, batch, update):
            before = state.model.first.weight.detach().clone()
            update()
            if not torch.equal(before, state.model.first.weight):
                steps.append((state.step, state.model.first.weight.grad.double()))

    trainer.compose([*trainer.strategies, Watch()])
    trainer.run()
    number, found = steps[0]
    own = [(step, gradient) for step, gradient in seen if step <= number]
    assert number == 4 and [step for step, _ in own] == [k for k in range(5) if k != at]
    wanted = sum(gradient for _, gradient in own) / (4 if reduce == "mean" else 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


class Broken(Strategy):
    """A term that is 0 and whose gradient is not a number."""

    def penalty(self, state, batch, output):
        return sum((p * 0).sqrt().sum() for p in state.parameters().values())


def test_gradients_that_no_scale_helps_end_the_run():
    words = r"the gradients are not finite at step 30 \(experience 0, .*\): loss_scale = 6.*; there is no checkpoint"
    with pytest.raises(NonFiniteLoss, match=words):
        run([Broken()], max_steps=100)


@pytest.mark.parametrize("stop_at", [0, 3, STEPS, 2 * STEPS + 3])
def test_a_stopped_run_goes_on_exactly(tmp_path, stop_at):
    """Also right behind a step that overflowed: scale and its growth are in the checkpoint."""

    class Stop(Strategy):
        def on_step_end(self, state, batch, output):
            if state.step == stop_at + 1:
                self.trainer.request_stop()

    options = {"backbone": Loud, "lr": 1e-6, "clip_norm": 1.0}
    whole, trainer, watch = run([Si()], **options)
    first = made([Si()], run_dir=tmp_path, **options)
    stop = Stop()
    stop.trainer = first
    first.compose([*first.strategies, stop])
    first.strategies.remove(stop)
    assert first.run().status == "interrupted"
    rest, second, more = run([Si()], run_dir=tmp_path, resume=True, **options)
    assert first.ledger.observers[0].losses + more.losses == watch.losses
    assert rest.R == whole.R and rest.traces == whole.traces
    assert equal(second.state.model.state_dict(), trainer.state.model.state_dict())
    assert equal(second.state.scaler.state_dict(), trainer.state.scaler.state_dict())
    assert equal(second.strategies[0].state_dict(), trainer.strategies[0].state_dict())


# gradients of one's own


def test_gradients_take_a_smaller_scale_where_they_would_overflow():
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    scaler, unused = LossScaler("cpu"), torch.ones(1, requires_grad=True)
    loud, none = scaler.gradients((x * 10).sum().float(), [x, unused])
    assert loud.dtype == torch.float32 and loud.tolist() == [10.0] * 3 and none is None
    (quiet,) = scaler.gradients((x.float() * 1e-8).sum(), [x])
    assert quiet.tolist() == pytest.approx([1e-8] * 3, rel=1e-3)
    assert scaler.get_scale() == 2.0**16, "the run's scale is its own"
    with pytest.raises(FloatingPointError, match="the gradients of a loss of 0 are not finite at any loss scale"):
        scaler.gradients((x * 0).sqrt().sum(), [x])


def test_without_loss_scaling_gradients_are_autograds_own():
    x = torch.ones(2, requires_grad=True)
    (found,) = LossScaler(enabled=False).gradients(x.sin().sum(), [x])
    assert torch.equal(found, torch.autograd.grad(x.sin().sum(), [x])[0])


@pytest.mark.parametrize("enabled", [False, True])
def test_what_has_no_part_in_a_loss_has_no_gradient(enabled):
    """The square of 3 falls by 6; heads of other tasks are not in it."""
    used, unused = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0))
    found = LossScaler("cpu", enabled=enabled).gradients(used.square(), iter([used, unused]))
    assert float(found[0]) == 6.0 and found[1] is None
