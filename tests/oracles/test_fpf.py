"""FPF against a plain finetuning with momentum and cosine by hand, on the rows that were drawn."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones.resnet18 import Resnet18
from cl.buffers.base import Buffer
from cl.core import Setting, UserError
from cl.testing import ToyNet, equal, naive_run, toy_stream, train
from strategies._finetune import Finetune
from strategies._modules import matching, training_only
from strategies.der import Der
from strategies.fpf import Fpf
from strategies.remind import Remind
from strategies.replay import Replay

CLASS = Setting.CLASS_INCREMENTAL


class Watched(Fpf):
    """Keeps the rows of every finetuning step, and the weights before and after the finetuning."""

    def on_run_start(self, state):
        super().on_run_start(state)
        self.drawn_rows, self.before, self.after = [], None, None

    def _loss(self, state, buffer):
        prepare = type(state).prepare

        def noting(rows, generator=None):
            self.drawn_rows.append(prepare(state, rows, generator))
            return self.drawn_rows[-1]

        state.prepare = noting
        try:
            return super()._loss(state, buffer)
        finally:
            del state.prepare

    def finetune(self, state):
        self.before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
        super().finetune(state)
        self.after = {n: p.detach().clone() for n, p in state.model.named_parameters()}


Watched.name = "fpf"


def check(lab, steps=12, repeats=1, modules="all", setting=CLASS):
    """The weights after finetuning, from those before it and the rows."""
    fpf = Watched(modules, capacity=40, steps=steps, replay_batch_size=8, lr=0.2, momentum=0.8, repeats=repeats)
    recorder, _ = lab.run([fpf], setting)
    lab.close(fpf.before, recorder.steps[-1].after, rtol=0, atol=0)
    model = deepcopy(recorder.start)
    model.load_state_dict(fpf.before)
    selected = [n for n in fpf.before if modules == "all" or n.startswith("head")]
    assert len(fpf.drawn_rows) == steps * repeats
    for number, rows in enumerate(fpf.drawn_rows):
        step = number % steps
        if step == 0:
            velocity = dict.fromkeys(selected, 0.0)
        gradients = lab.gradient(model, F.cross_entropy(model(rows).logits, rows.targets))
        rate = 0.2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for name, p in model.named_parameters():
                # momentum does not move a head that no row asks for
                is_asked = not name.startswith("head.heads") or int(name.split(".")[2]) in rows.task_id
                if name in selected and is_asked:
                    velocity[name] = 0.8 * velocity[name] + gradients[name]
                    p -= rate * velocity[name]
    lab.close(fpf.after, lab.weights(model), rtol=1e-6)
    assert all(torch.equal(fpf.before[n], fpf.after[n]) == (n not in selected) for n in fpf.before)
    return fpf


@pytest.mark.parametrize("modules", ["all", ["head"]])
@pytest.mark.parametrize("setting", [CLASS, Setting.TASK_INCREMENTAL])
def test_finetuning_is_the_plain_loop(lab, modules, setting):
    check(lab, modules=modules, setting=setting)


def test_repeats_start_anew(lab):
    check(lab, repeats=3)


def test_the_oracle_needs_the_cosine(lab, monkeypatch):
    monkeypatch.setattr("strategies._finetune.cosine", lambda step, steps: 1.0)
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_frozen_rest(lab, monkeypatch):
    monkeypatch.setattr("strategies._finetune.matching", lambda model, patterns, name: dict(model.named_parameters()))
    lab.dies(lambda: check(lab, modules=["head"]))


def test_training_before_it_is_plain():
    """Bit for bit naive up to the last evaluation."""
    run, naive = train(CLASS, [Fpf(modules="all", capacity=40, steps=20)]), naive_run(CLASS)
    assert run.losses == naive.losses
    assert run.result.R[:-1] == naive.result.R[:-1]
    assert run.result.R[-1] != naive.result.R[-1]


def test_rows_are_counted_once_per_step_of_finetuning():
    run, naive = train(CLASS, [Fpf(capacity=40, steps=20, repeats=2, replay_batch_size=8)]), naive_run(CLASS)
    more = run.trainer.state.spent.backwards - naive.trainer.state.spent.backwards
    assert more == 2 * 20 * 8 == run.tally.backwards - naive.tally.backwards
    assert all(cost.forwards == 0 for cost in run.declared)


# frozen and as found


class Gate(torch.autograd.Function):
    """Notes that a gradient passes."""

    passed = 0

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        Gate.passed += 1
        return gradient


class Gated(ToyNet):
    """A gradient that goes on below the features is noted."""

    def features(self, inputs):
        return Gate.apply(super().features(inputs))


def test_nothing_is_computed_below_the_lowest_selected_module(lab):
    def passes(modules):
        Gate.passed = 0
        lab.run([Fpf(modules, capacity=40, steps=7, replay_batch_size=8)], CLASS, backbone=Gated)
        return Gate.passed - 36

    assert passes(["head"]) == 0
    assert passes(["first"]) == 7
    assert passes("all") == 7


def test_momentum_of_the_run_is_left_alone(lab):
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    kept = []
    for steps in (0, 10):
        _, trainer = lab.run([Fpf(capacity=40, steps=steps)], CLASS, optimizer=sgd)
        kept.append(trainer.state.optimizer.state_dict()["state"])
        assert all(p.requires_grad for p in trainer.state.model.parameters())
    assert equal(*kept)


def test_an_error_inside_leaves_the_model_as_found():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(3, 2)
    chosen = {"1.weight": model[1].weight}
    with pytest.raises(RuntimeError), training_only(model, chosen, keeps_statistics=True):  # noqa: PT012
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, False]
        assert not model[1].training and model[0].training
        model[0].weight.grad = None
        raise RuntimeError
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert model[1].training
    assert torch.equal(model[0].weight.grad, torch.ones(3, 2))


class Normed(ToyNet):
    def __init__(self, info):
        super().__init__(info)
        self.norm = nn.BatchNorm1d(12)

    def features(self, inputs):
        return self.norm(super().features(inputs))


def test_running_statistics_are_an_option(lab):
    def seen(updates):
        fpf = Fpf(["head"], capacity=40, steps=9, replay_batch_size=8, updates_statistics=updates)
        _, trainer = lab.run([fpf], CLASS, backbone=Normed)
        norm = trainer.state.model.norm
        assert norm.training
        return int(norm.num_batches_tracked), norm.running_mean

    (with_them, moved), (without, kept) = seen(True), seen(False)
    assert (with_them, without) == (36 + 9, 36)
    plain = lab.run([], CLASS, backbone=Normed)[1].state.model.norm
    assert torch.equal(kept, plain.running_mean) and not torch.equal(moved, kept)


# which modules


def test_patterns_name_modules_containers_and_classes():
    info = toy_stream(CLASS).info
    trainer = train(CLASS, [], backbone=partial(Resnet18, width=2), epochs=None, max_steps=1).trainer

    def names(*patterns):
        return set(matching(trainer.state.model, patterns, "fpf.modules"))

    assert names("head") == {"head.weight", "head.bias"}
    assert names("bn") == {"bn.weight", "bn.bias"}
    assert names("blocks.0") == {f"blocks.0.{x}" for x in names_below(trainer.state.model.blocks[0])}
    every = {n for n, m in trainer.state.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert names("BatchNorm2d") == {f"{n}.{key}" for n in every for key in ("weight", "bias")}
    assert names("head", "conv") == {"head.weight", "head.bias", "conv.weight"}
    assert names("*") == set(trainer.state.parameters())
    assert info.num_outputs == 6


def names_below(module):
    return [name for name, _ in module.named_parameters()]


def test_unknown_pattern_lists_the_modules():
    with pytest.raises(UserError) as found:
        train(CLASS, [Fpf(["head", "fc*"])])
    assert str(found.value) == (
        "fpf.modules has 'fc*', which matches no module with parameters; the model's modules are head (Linear), "
        "first (Linear)"
    )


def test_auto_takes_the_most_sensitive_modules(lab):
    """On the class-incremental toy stream that is the head, and the input layer where the budget allows."""
    for frac, wanted in ((0.2, {"head.weight", "head.bias"}), (1.0, None)):
        fpf = Watched("auto", capacity=40, steps=5, replay_batch_size=8, snapshot_steps=3, auto_frac=frac)
        lab.run([fpf], CLASS)
        moved = {name for name in fpf.before if not torch.equal(fpf.before[name], fpf.after[name])}
        assert moved == (wanted or set(fpf.before))
        assert fpf.tracker.ranking()[0] == "head"


def test_auto_takes_all_modules_where_it_cannot_rank(lab):
    fpf = Watched("auto", capacity=40, steps=5, replay_batch_size=8, snapshot_steps=1000)
    lab.run([fpf], CLASS)
    assert fpf.tracker.ranking() == []
    assert not any(torch.equal(fpf.before[name], fpf.after[name]) for name in fpf.before)


def test_heads_are_ranked_together():
    run = train(Setting.TASK_INCREMENTAL, [Fpf(**Fpf.contract.toy)])
    assert sorted(run.trainer.strategies[1].tracker.ranking()) == ["first", "head"]


# whose buffer


def test_borrowed_rows_come_from_the_other_buffer(lab):
    replay = Replay(capacity=30)
    fpf = Watched("all", buffer_of="replay", steps=25, replay_batch_size=8)
    _, trainer = lab.run([replay, fpf], CLASS)
    stored = set(lab.rows_of(replay.buffer.rows(torch.arange(30))))
    drawn = {row for rows in fpf.drawn_rows for row in lab.rows_of(rows)}
    assert drawn <= stored and len(drawn) > 25
    assert len(fpf.buffer) == 0 and fpf.cost(trainer.state, 16).buffer_bytes == 0


def test_improves_the_strategy_it_stands_behind():
    def final(*strategies):
        return train(CLASS, list(strategies)).result.metrics["final"]

    alone = final(Replay(capacity=60, replay_batch_size=4))
    assert final(Replay(capacity=60, replay_batch_size=4), Fpf("all", "replay", steps=100)) > alone


@pytest.mark.parametrize(
    ("strategies", "sentence"),
    [
        (
            lambda: [Replay(), Fpf(buffer_of="der")],
            "fpf.buffer_of is 'der'; it must be a strategy that keeps a buffer beside fpf (replay), or null",
        ),
        (
            lambda: [Fpf(buffer_of="der")],
            "fpf.buffer_of is 'der'; it must be a strategy that keeps a buffer beside fpf",
        ),
        (lambda: [Fpf(buffer_of="fpf")], "fpf.buffer_of is its own name; leave it null for a buffer of its own"),
        (
            lambda: [Remind(), Replay(), Fpf(buffer_of="remind")],
            "fpf.buffer_of is 'remind', whose rows are codes that the model does not read; name a strategy that stores "
            "inputs, or leave it null for a buffer of its own",
        ),
        (
            lambda: [Replay(20), Fpf(buffer_of="replay")],
            "fpf.replay_batch_size is 32; it must be at most the capacity of the buffer of replay, 20",
        ),
    ],
)
def test_wrong_compositions_are_named(strategies, sentence):
    with pytest.raises(UserError) as found:
        train(CLASS, strategies())
    assert str(found.value).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"capacity": 20}, "fpf.replay_batch_size is 32; it must be at most fpf.capacity, 20"),
        ({"modules": []}, "fpf.modules is []; it must be auto, all, or a list of patterns of module names"),
        ({"modules": 3}, "fpf.modules is 3; it must be auto, all, or a list of patterns of module names"),
        ({"steps": -1}, "fpf.steps is -1; it must be an integer of at least 0"),
        ({"lr": 0}, "fpf.lr is 0; it must be a finite number above 0"),
        ({"momentum": 1}, "fpf.momentum is 1; it must be below 1"),
        ({"repeats": 0}, "fpf.repeats is 0; it must be an integer of at least 1"),
        ({"replay_batch_size": None}, "fpf.replay_batch_size is None; it must be an integer of at least 1"),
        ({"auto_frac": 0}, "fpf.auto_frac is 0; it must be a finite number above 0"),
        ({"auto_frac": 1.5}, "fpf.auto_frac is 1.5; it must be at most 1"),
        ({"snapshot_steps": 0}, "fpf.snapshot_steps is 0; it must be an integer of at least 1"),
        ({"policy": "lifo"}, "buffer policy is 'lifo'; the policies are"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(UserError) as found:
        Fpf(**arguments)
    assert str(found.value).startswith(sentence)


def test_buffers_of_others_may_be_of_any_kind():
    assert isinstance(Der().buffer, Buffer) and issubclass(Fpf, Finetune)
    assert train(CLASS, [Der(40), Fpf("all", "der", steps=3)]).result.status == "done"
