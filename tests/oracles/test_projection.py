"""GPM, OWM and Hebbian projection: old responses stay whatever the optimizer does; other layers are named."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones import Backbone
from cl.backbones.convnet import Convnet
from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, equal, toy_stream, train
from cl.trainer import Trainer
from strategies._held_inputs import HeldInputs
from strategies._layer_inputs import input_rows, listening
from strategies._subspace import Damped
from strategies.gpm import Gpm
from strategies.hebbian import Hebbian
from strategies.owm import Owm

MAKE = {
    "gpm": partial(Gpm, thresholds=0.9, num_rows=100),
    "owm": partial(Owm, alpha=1e-7, num_rows=40, rows_per_mean=4),
    "hebbian": partial(Hebbian, neurons=0.15, growth=0.12, rates=0.05, inner_steps=5),
}
OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "decay": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.005),
    "adamw": partial(torch.optim.AdamW, lr=0.005, weight_decay=0.1),
}


class GradientOnly(Gpm):
    """The mutant: projects the gradient, as the official code does, and lets the optimizer do the rest."""

    def on_gradients(self, state):
        for name, layer in self.layers(state).items():
            if self.subspaces[name].rank:
                gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], dim=1)
                kept = self.subspaces[name].project(gradient)
                layer.weight.grad.copy_(kept[:, :-1].view_as(layer.weight))
                layer.bias.grad.copy_(kept[:, -1])

    def _attach(self, state):
        pass

    def step(self, state, batch, update):
        update()


GradientOnly.name = "mutant"


def drift(strategy, lab, optimizer, backbone=ToyNet, setting=Setting.DOMAIN_INCREMENTAL, more=()):
    """Largest change, after any later experience, of a layer's response to the part of what it read at the end of an
    experience that its subspace then held; and by how much its weights moved elsewhere. In float32."""
    kept = []

    class Keeper(lab.Recorder):
        def on_experience_end(self, state):
            rows = state.prepare(state.data.rows(torch.arange(64)))
            layers = strategy.layers(state)
            with torch.no_grad(), listening(state.model, layers) as listener:
                state.model(rows)
                seen = listener.passes[-1][1]
            for name, layer in layers.items():
                weight = torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], dim=1)
                self.now.setdefault(name, []).append(weight.clone())
                subspace = strategy.subspaces[name]
                if subspace.rank == 0:
                    continue
                # owm holds faint directions by halves
                basis = subspace.basis[:, subspace.strength > 1 - 1e-6]
                inputs = input_rows(layer, seen[name][-1])
                kept.append((name, len(self.now[name]) - 1, inputs @ basis @ basis.T))

    keeper = Keeper()
    keeper.now = {}
    config = TrainerConfig(epochs=2, batch_size=16, device="cpu")
    Trainer(toy_stream(setting), backbone, [strategy, keeper, *more], optimizer=optimizer, config=config).run()
    changes, moves = [], []
    for name, experience, inputs in kept:
        then, *later = keeper.now[name][experience:]
        changes += [float(((weight - then) @ inputs.T).abs().max()) for weight in later]
        moves += [float((weight - then).norm() / then.norm()) for weight in later]
    return max(changes), max(moves)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", MAKE)
def test_old_responses_stay(method, optimizer, lab):
    changed, moved = drift(MAKE[method](), lab, OPTIMIZERS[optimizer])
    assert changed < 1e-5
    assert moved > 0.01


@pytest.mark.parametrize("method", ["gpm", "hebbian"])
def test_old_responses_stay_though_a_penalty_pulls_the_weights(method, lab):
    """Gradients of a penalty do not pass through the layer; that they drift is noticed, and held from then on."""
    strategy = MAKE[method]()

    class Pull(Strategy):
        settings = frozenset(Setting)

        def penalty(self, state, batch, output):
            return sum(p.square().sum() for p in state.model.parameters())

        def on_experience_end(self, state):
            if state.experience.id:
                # the plug-in named first has ended the experience already
                assert "first" in strategy.drifting

    Pull.name = "pull"
    kept = drift(strategy, lab, partial(torch.optim.SGD, lr=0.02), more=[Pull()])
    assert kept[0] < 1e-5
    assert kept[1] > 0.01


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_soft_projection_acts_once(has_bias):
    """theta + P(step), by hand: directions that are held by halves must not be projected in the gradient as well."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=has_bias, dtype=torch.float64)
    subspace, inputs = Damped(0.5), torch.randn(6, 4, dtype=torch.float64)
    for rows in input_rows(layer, inputs).split(2):
        subspace.update(rows)
    subspace.end_task()
    assert not subspace.is_exact
    whole = torch.cat([p.detach().view(3, -1) for p in layer.parameters()], dim=1)
    gradient = 2 * F.linear(input_rows(layer, inputs), whole).T @ input_rows(layer, inputs)
    expected = whole + subspace.project(-0.1 * gradient)

    held = HeldInputs(layer, subspace, subspace.response(layer), by_gradients=False)
    layer(inputs).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    answer = layer(inputs).detach()
    held.fold()
    held.detach()
    found = torch.cat([p.detach().view(3, -1) for p in layer.parameters()], dim=1)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(layer(inputs), answer, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["decay", "adam", "adamw"])
def test_projecting_the_gradient_alone_does_not_keep_them(optimizer, lab):
    lab.dies(lambda: _small(drift(GradientOnly(thresholds=0.9, num_rows=100), lab, OPTIMIZERS[optimizer])))


def _small(found):
    assert found[0] < 1e-5


@pytest.mark.parametrize("method", MAKE)
def test_old_responses_of_convolutions_stay(method, lab):
    changed, moved = drift(MAKE[method](), lab, OPTIMIZERS["adam"], backbone=Convnet)
    assert changed < 2e-5  # sums of up to 501 inputs
    assert moved > 0.01


def test_the_network_says_the_same_to_rows_it_holds(lab):
    """Every direction of 20 rows is held in every layer, so the network must not change on them at all."""

    class OfTheFirst(Gpm):
        def rows_at_end(self, state):
            return iter([torch.arange(20)])

    OfTheFirst.name = "gpm"
    answers = []

    class Keeper(lab.Recorder):
        def on_experience_end(self, state):
            rows = state.prepare(state.stream.experiences[0].load().rows(torch.arange(20)))
            with torch.no_grad():
                answers.append(state.model(rows).logits)

    config = TrainerConfig(epochs=2, batch_size=16, device="cpu")
    optimizer, stream = OPTIMIZERS["adamw"], toy_stream(Setting.DOMAIN_INCREMENTAL)
    backbone = partial(ToyNet, num_features=64)
    Trainer(stream, backbone, [OfTheFirst(thresholds=1.0), Keeper()], optimizer=optimizer, config=config).run()
    assert float((answers[-1] - answers[0]).abs().max()) < 1e-5


# layers that no method can hold, and layers with nothing left to move


class Normed(Backbone):
    """A linear layer with batch norm behind it."""

    def __init__(self, info):
        super().__init__(info, 12)
        self.first, self.norm = nn.Linear(math.prod(info.input_shape), 12), nn.BatchNorm1d(12)

    def features(self, inputs):
        return self.norm(self.first(inputs.flatten(1))).relu()


def test_layers_of_other_types_are_named():
    with pytest.raises(
        UserError, match=r"gpm cannot work on the layer norm \(BatchNorm1d\) of \w+; it works on Linear, Conv1d"
    ):
        _trained(Gpm(), Normed)
    with pytest.raises(UserError, match=r"hebbian.others is 'drop'; it must be one of refuse, freeze, train"):
        Hebbian(others="drop")


def _trained(strategy, backbone, **config):
    config = TrainerConfig(**({"epochs": 1, "batch_size": 16, "device": "cpu"} | config))
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL)
    trainer = Trainer(stream, backbone, [strategy], optimizer=OPTIMIZERS["adam"], config=config)
    trainer.run()
    return trainer


class TestFreezing:
    """With others=freeze the whole network keeps its answers, batch norm included."""

    @staticmethod
    def moved(lab, others):
        kept = []

        class Keeper(lab.Recorder):
            def on_experience_end(self, state):
                kept.append({name: value.clone() for name, value in state.model.state_dict().items() if "norm" in name})
                assert state.model.norm.training

        config = TrainerConfig(epochs=1, batch_size=16, device="cpu")
        strategies = [Gpm(thresholds=0.9, others=others), Keeper()]
        stream = toy_stream(Setting.DOMAIN_INCREMENTAL)
        Trainer(stream, Normed, strategies, optimizer=OPTIMIZERS["adamw"], config=config).run()
        return [name for name, value in kept[0].items() if not torch.equal(value, kept[-1][name])]

    def test_freeze(self, lab):
        assert self.moved(lab, "freeze") == []

    def test_train(self, lab):
        moved = self.moved(lab, "train")
        assert {"norm.weight", "norm.running_mean"} <= set(moved)


class Functional(Backbone):
    """Uses a layer's weights without calling it."""

    def __init__(self, info):
        super().__init__(info, 12)
        self.first = nn.Linear(math.prod(info.input_shape), 12)

    def features(self, inputs):
        return F.linear(inputs.flatten(1), self.first.weight, self.first.bias).relu()


@pytest.mark.parametrize("method", MAKE)
def test_layers_that_are_not_called_are_named(method):
    with pytest.raises(UserError, match=rf"{method} cannot see what the layer first \(Linear\) reads"):
        _trained(MAKE[method](), Functional)


class Idle(ToyNet):
    """Has a layer that no row reaches, as a memory that is a tree has nodes that nobody fetches."""

    def __init__(self, info):
        super().__init__(info)
        self.idle = nn.Linear(12, 12)

    def features(self, inputs):
        hidden = super().features(inputs)
        return hidden + self.idle(hidden[:0]).sum()


@pytest.mark.parametrize("method", MAKE)
def test_of_a_layer_that_reads_nothing_nothing_is_held(method):
    strategy = MAKE[method]()
    trainer = _trained(strategy, Idle)
    assert strategy.subspaces["first"].rank > 0
    assert strategy.subspaces["idle"].rank == 0
    assert not any(name == "idle_captured" for name, *_ in trainer.ledger.result.extra)
    assert all(p.isfinite().all() for p in trainer.state.model.parameters())


@pytest.mark.parametrize(
    "strategy",
    [
        Gpm(thresholds=1.0),
        Owm(alpha=1e-9, rows_per_mean=1),
        Hebbian(neurons=40, growth=40, rates=0.05),
    ],
    ids=lambda s: s.name,
)
def test_a_full_layer_is_reported_and_stands_still(strategy, lab):
    """Training goes on: the other layers, and R, are still there."""
    with pytest.warns(UserWarning, match=r"no direction of the \d+ inputs of layer first is free after experience \d"):
        trainer = _trained(strategy, ToyNet)
    assert "first" in strategy.full
    assert len(trainer.ledger.result.R) == 3


def test_what_is_held_is_written_down():
    trainer = _trained(MAKE["hebbian"](), ToyNet)
    found = {(name, experience): value for name, experience, _, value in trainer.ledger.result.extra}
    assert found["first_rank", 0] == round(0.15 * 65)
    assert found["first_rank", 2] == round(0.15 * 65) + 2 * round(0.12 * 65)
    assert found["first_orthonormality", 1] >= 0
    assert 0.1 < found["first_captured", 0] < found["first_captured", 2] <= 1
    trainer = _trained(MAKE["gpm"](), ToyNet)
    found = {(name, experience): value for name, experience, _, value in trainer.ledger.result.extra}
    assert 0.89 < found["head_captured", 2] <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gpm(thresholds=[0.9, 1.5]), r"gpm.thresholds is 1.5; it must be at most 1"),
        (lambda: Gpm(num_rows=0), r"gpm.num_rows is 0; it must be an integer of at least 1"),
        (lambda: Owm(alpha=0), r"owm.alpha is 0; it must be a finite number above 0"),
        (lambda: Hebbian(neurons=[3, 2.5]), r"hebbian.neurons is 2.5; it must be a whole number, or a share below 1"),
        (lambda: Hebbian(rates=[]), r"hebbian.rates is \[\]"),
        (lambda: Hebbian(growth=-1), r"hebbian.growth is -1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_neurons_by_layer_and_experience():
    hebbian = Hebbian(neurons=[80, 0.5], growth=[[70, 10], [0.5, 4]])
    assert [hebbian._num_new(0, layer, 100) for layer in range(3)] == [80, 50, 50]
    assert [hebbian._num_new(1, layer, 100) for layer in range(3)] == [70, 10, 10]
    assert [hebbian._num_new(5, layer, 100) for layer in range(2)] == [50, 4]


@pytest.mark.parametrize("stop_at", [40, 41])
def test_a_resumed_run_rounds_alike(tmp_path, stop_at):
    """Widths with which one of two buffers in a row is not aligned, and an even and an odd number of steps."""
    options = {"neurons": 0.15, "growth": 0.1, "rates": 0.05, "inner_steps": 5}
    whole = train(Setting.DOMAIN_INCREMENTAL, [Hebbian(**options)])
    first = train(Setting.DOMAIN_INCREMENTAL, [Hebbian(**options)], run_dir=tmp_path, stop_at=stop_at)
    resumed = train(Setting.DOMAIN_INCREMENTAL, [Hebbian(**options)], run_dir=tmp_path, resume=True)
    assert first.result.status == "interrupted"
    assert resumed.losses == whole.losses[resumed.first_step :]
    assert equal(resumed.weights, whole.weights)
