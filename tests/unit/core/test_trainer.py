"""The loop against a plain one written out here, and each option against what it promises."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.config import TrainerConfig
from cl.core import Setting, Source, UserError
from cl.hooks import Strategy
from cl.observe import Observer
from cl.schedules import cosine, linear
from cl.seeding import Seeds
from cl.testing import ToyNet, equal, toy_stream
from cl.trainer import Trainer

DIL, TIL, TEXT = Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL, Setting.CONTINUAL_PRETRAINING
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Losses(Observer):
    """Total loss and learning rate of every step."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_step(self, state, losses, lr):
        self.losses.append(losses["loss"])
        self.rates.append(lr)


def run(strategies=(), setting=DIL, stream=None, optimizer=SGD, schedule=None, seed=0, backbone=ToyNet, **config):
    watch = Losses()
    trainer = Trainer(
        stream or toy_stream(setting),
        backbone,
        strategies,
        optimizer=optimizer,
        config=TrainerConfig(**({"batch_size": 16, "device": "cpu"} | config)),
        observers=[watch],
        seed=seed,
        **({"schedule": schedule} if schedule else {}),
    )
    return trainer.run(), trainer, watch


def weights(trainer):
    return trainer.state.model.state_dict()


# against a plain loop


@pytest.mark.parametrize("setting", list(Setting))
def test_naive_training_is_a_plain_loop(setting):
    _, trainer, watch = run(setting=setting, epochs=2)
    stream, seeds = toy_stream(setting), Seeds(0)
    with seeds.as_global("init"):
        model = ToyNet(stream.info)
    optimizer = SGD(model.parameters())
    losses = []
    for experience in stream.experiences:
        data = experience.load()
        for epoch in range(2):
            for index in experience.order(len(data), epoch, seeds.fresh("order", experience.id, epoch)).split(16):
                batch = stream.prepare(data.rows(index))
                logits = model(batch).logits
                loss = F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert watch.losses == losses
    assert equal(weights(trainer), model.state_dict())


def test_another_seed_is_another_run():
    assert run(max_steps=3)[2].losses != run(max_steps=3, seed=1)[2].losses


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state()
    run(max_steps=3)
    assert torch.equal(before, torch.get_rng_state())


def test_one_experience_is_a_stream_too():
    result, _, _ = run(stream=toy_stream(DIL, num_experiences=1))
    assert result.status == "done"
    assert len(result.R) == len(result.R[0]) == 1
    assert result.metrics["final"] == result.R[0][0]
    assert result.metrics["bwt"] != result.metrics["bwt"], "backward transfer of one experience is undefined"


# budgets


def test_budgets_in_epochs_steps_and_tokens_agree():
    by_epochs = run(epochs=2)[2].losses
    assert run(max_steps=24)[2].losses == by_epochs
    assert run(max_tokens=2 * 192)[2].losses == by_epochs


def test_an_experience_that_holds_other_rows_than_it_announced_is_not_trained_on():
    stream = toy_stream(DIL)
    first, *others = stream.experiences
    liar = replace(stream, experiences=[replace(first, num_samples=first.num_samples + 1), *others])
    with pytest.raises(UserError, match="announced 193 rows but its data holds 192"):
        run(stream=liar)


def test_text_budgets_count_tokens():
    _, trainer, watch = run(setting=TEXT, max_tokens=1000)
    # 8 tokens a row, 16 rows a step: 8 steps reach 1024 in each of three experiences
    assert len(watch.losses) == 24
    assert trainer.state.tokens == 3 * 1024
    assert trainer.state.total_steps == 24


# accumulation, clipping, precision


class Doubler(Strategy):
    """Adds every current row once more and a penalty on the weights: sums over rows of other strategies' making."""

    def on_batch(self, state, batch):
        return batch.extended(batch.current(), Source.REPLAY, self.name, weight=0.5)

    def penalty(self, state, batch, output):
        return 0.01 * sum(p.square().sum() for p in state.parameters().values())


@pytest.mark.parametrize("strategies", [[], [Doubler()]])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(32, 3), (24, 4), (40, 3)])
def test_accumulation_equals_the_large_batch(strategies, batch_size, accumulation):
    """Also where micro-batches differ in size: 40 rows three times, and at the end of an epoch 32 + 40."""
    large = run(strategies, batch_size=batch_size * accumulation, epochs=2)
    small = run(strategies, batch_size=batch_size, accumulation=accumulation, epochs=2)
    assert small[2].losses == pytest.approx(large[2].losses, rel=1e-4)
    for name, tensor in weights(large[1]).items():
        torch.testing.assert_close(weights(small[1])[name], tensor, rtol=1e-3, atol=1e-5)


class Norms(Strategy):
    """Gradient norm that reaches the optimizer."""

    def __init__(self):
        self.norms = []

    def step(self, state, batch, update):
        grads = [p.grad.flatten() for p in state.parameters().values() if p.grad is not None]
        self.norms.append(torch.cat(grads).norm().item())
        update()


def test_clipping_bounds_the_norm_and_spares_small_gradients():
    free, clipped = Norms(), Norms()
    run([free], max_steps=5)
    run([clipped], max_steps=5, clip_norm=0.5)
    assert max(free.norms) > 0.5
    assert all(norm <= 0.5 + 1e-5 for norm in clipped.norms)
    assert clipped.norms[0] == pytest.approx(min(free.norms[0], 0.5), rel=1e-4)
    loose = Norms()
    run([loose], max_steps=5, clip_norm=1e6)
    assert loose.norms == free.norms


def test_bfloat16_learns_and_keeps_float32_weights():
    full, half = run(epochs=3), run(epochs=3, precision="bf16")
    assert {tensor.dtype for tensor in weights(half[1]).values()} == {torch.float32}
    assert half[2].losses != full[2].losses
    assert half[2].losses == pytest.approx(full[2].losses, abs=0.25)
    assert half[0].R[0][0] > 0.8


# learning rate


def test_a_schedule_spans_the_run_or_each_experience():
    whole = run(max_steps=4, schedule=linear)[2].rates
    assert whole == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])
    each = run(max_steps=4, schedule=cosine, schedule_span="experience")[2].rates
    assert each == each[:4] * 3
    assert each[0] == pytest.approx(0.1)


def test_parameter_groups_keep_their_ratio_under_a_schedule():
    def two_groups(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": others}], lr=0.1)

    _, trainer, _ = run(max_steps=4, optimizer=two_groups, schedule=linear)
    slow, fast = (group["lr"] for group in trainer.state.optimizer.param_groups)
    assert fast == pytest.approx(10 * slow)


def test_the_optimizer_can_start_anew_in_every_experience():
    class Momentum(Strategy):
        def __init__(self):
            self.found = []

        def on_experience_start(self, state):
            self.found.append(len(state.optimizer.state))

    kept, new = Momentum(), Momentum()
    run([kept], max_steps=2)
    run([new], max_steps=2, reset_optimizer=True)
    assert new.found == [0, 0, 0]
    assert kept.found[1] > 0


# what hooks may read


def test_the_state_tells_where_the_run_is():
    class Notes(Strategy):
        def __init__(self):
            self.rows = []

        def on_batch(self, state, batch):
            self.rows.append((state.experience.id, state.step, state.micro_step, state.epoch, state.classes_seen))
            return batch

    notes = Notes()
    _, trainer, _ = run([notes], setting=Setting.CLASS_INCREMENTAL, epochs=2, batch_size=48, accumulation=2)
    assert notes.rows[:6] == [
        (0, 0, 0, 0, (0, 1)),
        (0, 0, 1, 0, (0, 1)),
        (0, 1, 0, 0, (0, 1)),
        (0, 1, 1, 0, (0, 1)),
        (0, 2, 0, 1, (0, 1)),
        (0, 2, 1, 1, (0, 1)),
    ]
    assert notes.rows[-1] == (2, 11, 1, 1, (0, 1, 2, 3, 4, 5))
    assert trainer.state.total_steps == trainer.state.step == 12


def test_epochs_are_counted_from_the_start_of_each_experience():
    """At its start the last epoch of the experience before was still shown, and after a resumption there, 0."""

    class Epochs(Strategy):
        def __init__(self):
            self.shown = []

        def on_experience_start(self, state):
            self.shown.append(("start", state.epoch))

        def on_experience_end(self, state):
            self.shown.append(("end", state.epoch))

    epochs = Epochs()
    run([epochs], epochs=3)
    assert epochs.shown == [("start", 0), ("end", 2)] * 3


def test_without_a_config_each_experience_is_trained_for_one_epoch():
    """192 rows each, 64 at a time; names that are given are reported, the others are found."""
    stream = toy_stream(DIL)
    trainer = Trainer(stream, ToyNet, [Doubler()], optimizer=SGD, names={"backbone": "mine"})
    result = trainer.run()
    assert result.cost["updates"] == 9
    assert (result.backbone, result.strategy, result.stream) == ("mine", ["test_trainer"], stream.info.name)


def test_progress_is_through_the_running_experience():
    class Clock(Strategy):
        def __init__(self):
            self.shown = []

        def on_batch(self, state, batch):
            self.shown.append(state.progress)
            return batch

        def on_experience_end(self, state):
            self.shown.append(state.progress)

    clock = Clock()
    result, trainer, _ = run([clock], max_steps=[2, 4])
    assert clock.shown == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1]
    assert trainer.state.total_steps == trainer.state.step == 6
    assert result.experiences == ["toy 0", "toy 1"], "the list is where the run ends"


def test_rows_are_counted_as_the_stream_delivers_them():
    """An experience of 192 rows is a step of 3 x 40 rows and one of 72; rows that a strategy adds are work only."""

    class Counts(Strategy):
        def __init__(self):
            self.name, self.rows = "counts", []

        def on_batch(self, state, batch):
            self.rows.append(state.step_rows)
            return batch

    counts = Counts()
    result, trainer, _ = run([counts, Doubler()], batch_size=40, accumulation=3)
    assert counts.rows == [120, 120, 120, 72, 72] * 3
    assert trainer.state.tokens == 3 * 192
    assert result.cost["forwards"] == result.cost["backwards"] == 2 * 3 * 192
    assert trainer.state.classes_seen == (0, 1, 2, 3), "classes that come back are not new"


def test_terms_of_the_backbone_are_trained_on():
    """Half the squared length of a weight: its gradient is the weight."""

    class Tolled(ToyNet):
        def forward(self, batch, start=0):
            output = super().forward(batch, start)
            output.auxiliary["toll"] = self.head.weight.square().sum() / 2
            return output

    sgd = partial(torch.optim.SGD, lr=0.1)
    (_, plain, free), (_, trainer, paid) = (
        run(stream=toy_stream(DIL, num_experiences=1), backbone=net, optimizer=sgd, max_steps=1)
        for net in (ToyNet, Tolled)
    )
    with Seeds(0).as_global("init"):
        start = ToyNet(toy_stream(DIL).info).head.weight.detach()
    assert paid.losses[0] == pytest.approx(free.losses[0] + start.square().sum().item() / 2)
    torch.testing.assert_close(weights(trainer)["head.weight"], weights(plain)["head.weight"] - 0.1 * start)


def test_heads_that_no_row_asks_for_do_not_move():
    """Momentum and weight decay must not touch the heads of other tasks."""
    with_decay = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    _, trainer, _ = run(stream=toy_stream(TIL).first(1), optimizer=with_decay, max_steps=5)
    with Seeds(0).as_global("init"):
        untouched = ToyNet(toy_stream(TIL).info)
    assert torch.equal(trainer.state.model.head.heads[2].weight, untouched.head.heads[2].weight)
    assert not torch.equal(trainer.state.model.head.heads[0].weight, untouched.head.heads[0].weight)
