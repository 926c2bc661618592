"""SHARP on small networks: phases, every training step, what is stored and how it predicts, done again plainly.

Its parts are checked one by one in test_sparse_units.py and test_activation_store.py.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cl.backbones import Stage
from cl.backbones.convnet import Convnet
from cl.backbones.mlp import Mlp
from cl.backbones.resnet18 import Resnet18
from cl.core import Setting, UserError
from cl.seeding import Seeds
from cl.testing import ToyNet, toy_stream
from strategies._activation_store import dequantised
from strategies._sparse_units import SparseUnits, as_weights, layers_of
from strategies.sharp import Sharp
from streams.split import split

CLASS, TASK = Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL
TEMPERATURE = 0.2
OPTIONS = {"phase_epochs": 1, "max_phases": 2, "temperature": TEMPERATURE, "stored_rows": 6, "prune": 0.3}


class Deep(ToyNet):
    """Two stages of one layer each."""

    def __init__(self, info):
        super().__init__(info)
        self.second = nn.Linear(12, 12)

    def stages(self):
        return [Stage(self._first, (self.first,)), Stage(self._second, (self.second,))]

    def features(self, inputs):
        return self._second(self._first(inputs))

    def _first(self, inputs):
        return self.first(inputs.flatten(1)).relu()

    def _second(self, hidden):
        return self.second(hidden).relu()


# 2: phases


def test_phases_and_their_share(lab, monkeypatch):
    """tau = (1 + cos(pi p / 30)) / 2, not below the floor, on rows that stay the same within an experience."""
    seen = []
    select = SparseUnits.select

    def noted(self, activations, share):
        seen.append((share, activations[0].clone()))
        select(self, activations, share)

    monkeypatch.setattr(SparseUnits, "select", noted)
    rows = []
    monkeypatch.setattr(
        Sharp, "_selection", lambda self, state, old=Sharp._selection: rows.append(old(self, state)) or rows[-1]
    )
    options = OPTIONS | {"max_phases": 3, "floor": 0.98}
    _, trainer = lab.run([Sharp(**options)], CLASS, backbone=Deep, epochs=5)
    assert [share for share, _ in seen] == [
        pytest.approx(max(0.98, 0.5 * (1 + math.cos(math.pi * p / 30)))) for p in (1, 2, 3)
    ] * 3
    assert all(torch.equal(rows[k], rows[3 * (k // 3)]) for k in range(9))
    assert trainer.strategies[0].phase == [2, 3]


def test_the_optimizer_starts_anew_in_every_phase(lab):
    """Adadelta has no memory in the first step of a phase, and one in all others."""
    known = []

    class Keeper(lab.Recorder):
        def on_batch(self, state, batch):
            known.append((state.experience.id, state.epoch, bool(state.optimizer.state)))
            return batch

    lab.run([Sharp(**OPTIONS), Keeper()], CLASS, backbone=Deep, epochs=3, optimizer=torch.optim.Adadelta)
    # two phases, of which the second lasts for two epochs
    phases = [(k, min(epoch, 1)) for k, epoch, _ in known]
    for number, (*_, has_memory) in enumerate(known):
        assert has_memory == (number > 0 and phases[number] == phases[number - 1])


def test_units_are_selected_on_a_thousand_rows_at_most():
    experience = SimpleNamespace(id=4)
    for num_rows, wanted in ((200, 200), (5000, 1024)):
        state = SimpleNamespace(seeds=Seeds(0), experience=experience, data=range(num_rows))
        rows = Sharp()._selection(state).tolist()
        assert len(set(rows)) == wanted and max(rows) < num_rows


@pytest.mark.parametrize(("num_stages", "wanted"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_the_stages_are_early_and_one_is_late(num_stages, wanted, monkeypatch):
    monkeypatch.setattr(Sharp, "_backbone", lambda *_: SimpleNamespace(stages=lambda: [None] * num_stages))
    assert Sharp()._cut(None) == wanted
    assert Sharp(cut=0)._cut(None) == 0


# 5: training


def contrastive(vectors, labels):
    z = [v / v.norm().clamp(min=1e-12) for v in vectors]
    terms = []
    for i, label in enumerate(labels):
        logits = [z[i] @ z[a] / TEMPERATURE for a in range(len(z)) if a != i]
        positive = [z[i] @ z[a] / TEMPERATURE for a in range(len(z)) if a != i and labels[a] == label]
        if positive:
            terms.append(torch.stack(logits).logsumexp(0) - sum(positive) / len(positive))
    return sum(terms) / len(terms)


class Spy(Sharp):
    """Notes what the step was made with."""

    def on_batch(self, state, batch):
        mixed = super().on_batch(state, batch)
        kept = self.units.state_dict()
        self.notes = [*getattr(self, "notes", []), (deepcopy(kept), deepcopy(self._replayed), weights_now(state))]
        return mixed


def weights_now(state):
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def check(lab, strategy=Spy):
    """Every step, from the units and the replayed activations that were noted in it."""
    spy = strategy(**OPTIONS)
    spy.name = "sharp"
    recorder, _ = lab.run([spy], CLASS, backbone=Deep, epochs=2)
    model, ends = deepcopy(recorder.start), [weights for *_, weights in spy.notes[1:]]
    num_replayed = num_frozen = 0
    for number, (step, (units, replayed, before)) in enumerate(zip(recorder.steps, spy.notes, strict=True)):
        # rewiring has happened before this was noted
        model.load_state_dict(before)
        active = (units["ages"][-1] != 0).double()
        current = step.batch.current()
        hidden, labels = model(current).hidden * active, current.targets.tolist()
        if step.experience > 0:
            # the late stage begins behind the first one
            hidden = torch.cat([hidden, model._second(replayed.inputs) * active])
            labels = labels + replayed.targets.tolist()
            assert len(replayed) == len(current)
            assert set(replayed.targets.tolist()) == {2 * step.experience - 2, 2 * step.experience - 1}
            num_replayed += 1
        loss = contrastive(hidden, labels)
        lab.close(step.terms["sharp"], loss.detach(), rtol=1e-5)
        assert step.terms["cross_entropy"] == 0
        gradients = lab.gradient(model, loss)
        for layer, oldest, ages, mask in (
            ("first", 1, units["ages"][1], units["masks"][0]),
            ("second", 2, units["ages"][2], units["masks"][1]),
        ):
            for unit in range(12):
                if ages[unit] > oldest:
                    gradients[f"{layer}.weight"][unit], gradients[f"{layer}.bias"][unit] = 0.0, 0.0
                    num_frozen += 1
            gradients[f"{layer}.weight"] *= mask
            for name in (f"{layer}.weight", f"{layer}.bias"):
                lab.close(step.gradients[name], gradients[name], rtol=1e-5, atol=1e-6)
            assert (before[f"{layer}.weight"][~mask] == 0).all()
        is_last = number + 1 == len(recorder.steps) or recorder.steps[number + 1].experience != step.experience
        is_rewired = not is_last and number + 1 < len(spy.notes) and number % 12 == 11
        if not is_last and not is_rewired:
            wanted = {name: p - lab.lr * gradients[name] for name, p in before.items()}
            lab.close(ends[number], wanted, rtol=1e-5, atol=1e-6)
    assert num_replayed == 2 * 24 and num_frozen > 0


def test_classes_take_turns_in_what_is_replayed(lab):
    """Seven rows of two classes, then of four: one of each after the other, and again from the first."""
    spy = Spy(**OPTIONS, replay_batch_size=7, num_recent=2)
    stream = split(dataset="digits", num_experiences=5, setting="class_incremental", train_rows=200, eval_rows=50)
    lab.run([spy], stream.first(3), backbone=partial(Mlp, hidden=[12, 12]), epochs=1)
    shown = [replayed.targets.tolist() for _, replayed, _ in spy.notes if replayed is not None]
    first, last = shown[0], shown[-1]
    kept = [list(each) for each in spy.recent]
    assert len(first) == 7 and first == [first[0], first[1]] * 3 + [first[0]]
    assert sorted({*last}) != sorted({*first}) and len({*last}) == 4
    assert last[:4] == [*first[:2], *kept[0]] and last[4:] == last[:3]


def test_sharp_is_the_plain_loop(lab):
    check(lab)


def test_the_oracle_needs_the_replayed_activations(lab):
    class Forgetful(Spy):
        def penalty(self, state, batch, output):
            self._replayed = None
            return super().penalty(state, batch, output)

    lab.dies(lambda: check(lab, Forgetful))


def test_the_oracle_needs_the_frozen_weights(lab):
    class Loose(Spy):
        def _held(self, state):
            return [(p, torch.zeros_like(is_held)) for p, is_held in super()._held(state)]

    lab.dies(lambda: check(lab, Loose))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_and_absent_weights_do_not_move(lab, optimizer):
    """Not by momentum, weight decay or adaptive rates, and not from the step on that froze them."""
    made = {
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
        "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    }
    spy = Spy(**OPTIONS)
    _, trainer = lab.run([spy], CLASS, backbone=Deep, epochs=2, optimizer=made[optimizer])
    final, num = weights_now(trainer.state), 0
    for units, _, before in spy.notes:
        for layer, oldest, number in (("first", 1, 0), ("second", 2, 1)):
            frozen = units["ages"][number + 1] > oldest
            num += int(frozen.sum())
            connected = units["masks"][number][frozen]
            for name, rows in ((f"{layer}.weight", connected), (f"{layer}.bias", slice(None))):
                now, then = final[name][frozen][rows], before[name][frozen][rows]
                # connections from plastic units may be dropped later, and are zero then
                assert ((now == then) | (now == 0)).all(), name
    assert num > 0


def test_frozen_units_keep_what_they_say(lab):
    """What a unit of the early stage says of a row is the same at the end as when its experience was over."""
    spy = Spy(**OPTIONS)
    recorder, trainer = lab.run([spy], CLASS, backbone=Deep, epochs=2)
    rows = trainer.state.prepare(trainer.state.stream.experiences[0].load().rows(torch.arange(50)))
    first = deepcopy(recorder.ends[0])
    ages = next(n[0]["ages"][1] for n, s in zip(spy.notes, recorder.steps, strict=True) if s.experience == 1)
    old = ages > 1
    assert old.any()
    lab.close(trainer.state.model._first(rows.inputs)[:, old], first._first(rows.inputs)[:, old])


# 6: the end of an experience


@pytest.mark.parametrize("num_recent", [1, 2])
def test_what_is_stored_at_the_end(lab, num_recent):
    """Representations of the last classes by their rows, of replayed ones by activations, of older ones untouched."""
    kept = []

    class Watched(Sharp):
        def on_experience_end(self, state):
            super().on_experience_end(state)
            kept.append(deepcopy((self.state_dict(), state.model)))

    lab.run([Watched(**OPTIONS, num_recent=num_recent)], CLASS, backbone=Deep, epochs=2)
    for k, (state, model) in enumerate(kept):
        ages = state["units"]["ages"][-1]
        newest = state["recent"][-1]
        assert [set(each) for each in state["recent"]] == [{2 * j, 2 * j + 1} for j in range(k + 1)][-num_recent:]
        assert all(codes["codes"].shape == (6, 12) for codes in newest.values())
        assert set(state["classes"]) == set(range(2 * k + 2))
        for label in (2 * k, 2 * k + 1):
            now = state["classes"][label]
            assert torch.equal(now["mask"], ages >= 2) and now["vectors"].shape == (6, 12)
            early = dequantised(newest[label])
            # the activations are those of the same rows, before the plastic units were drawn anew
            used = model._second(early) * (ages != 0)
            step = newest[label]["step"]
            reach = model.second.weight.abs().sum(1).max() * step
            assert (used - now["vectors"])[:, ages >= 2].abs().max() <= reach
        for age in range(min(k, num_recent)):
            for label in (2 * (k - age) - 2, 2 * (k - age) - 1):
                now = state["classes"][label]
                again = model._second(dequantised(kept[k - 1][0]["recent"][-1 - age][label])) * (ages != 0)
                lab.close(now["vectors"], again.detach())
                wanted = ages >= 3 + age
                assert torch.equal(now["mask"], wanted if wanted.any() else torch.ones_like(wanted))
        if k > num_recent:
            lab.close(state["classes"][0]["vectors"], kept[k - 1][0]["classes"][0]["vectors"])


def test_plastic_units_begin_anew_and_others_stay(lab):
    """At the end of an experience; of absent connections nothing is drawn."""
    num_new = 0

    class Watched(Sharp):
        def on_experience_end(self, state):
            nonlocal num_new
            before = weights_now(state)
            super().on_experience_end(state)
            for layer, ages, mask in zip(("first", "second"), self.units.ages[1:], self.units.masks, strict=True):
                old, new = before[f"{layer}.weight"], weights_now(state)[f"{layer}.weight"]
                is_drawn = (ages == 0)[:, None] & mask
                assert torch.equal(old != new, is_drawn)
                num_new += int(is_drawn.sum())

    lab.run([Watched(**OPTIONS | {"floor": 0.5, "max_phases": 20})], CLASS, backbone=Deep, epochs=16)
    assert num_new > 0


@pytest.mark.parametrize("num_recent", [1, 2])
def test_of_a_class_that_comes_back_the_newest_rows_are_seen(lab, num_recent):
    """Classes 0 and 1, the same again, classes 2 and 3."""
    stream = toy_stream(CLASS)
    first, second, _ = stream.experiences
    order = [first, replace(first, id=1, name="again"), replace(second, id=2)]
    kept = []

    class Watched(Sharp):
        def on_experience_end(self, state):
            super().on_experience_end(state)
            kept.append(deepcopy((self.state_dict(), state.model)))

    lab.run([Watched(**OPTIONS, num_recent=num_recent)], replace(stream, experiences=order), backbone=Deep, epochs=2)
    masks = [[state["units"]["ages"][-1] >= youngest for youngest in (2, 3)] for state, _ in kept]
    for k, (state, model) in enumerate(kept):
        recent = state["recent"]
        assert len(recent) == min(k + 1, num_recent)
        for label in (0, 1):
            now = state["classes"][label]
            # in the second experience by its own rows; in the third, by those of the second
            codes = recent[-1][label] if k < 2 else kept[1][0]["recent"][-1][label]
            hidden = model._second(dequantised(codes)) * (state["units"]["ages"][-1] != 0)
            mask = masks[k][0 if k < 2 else 1]
            assert torch.equal(now["mask"], mask if mask.any() else torch.ones_like(mask)), (k, label)
            reach = model.second.weight.abs().sum(1).max() * codes["step"]
            assert (hidden - now["vectors"])[:, now["mask"]].abs().max() <= reach, (k, label)


# 7: prediction


@pytest.mark.parametrize("setting", [CLASS, TASK])
def test_predictions_are_those_of_a_plain_vote(lab, setting):
    _, trainer = lab.run([strategy := Sharp(**OPTIONS)], setting, backbone=Deep, epochs=2)
    state, num = trainer.state, trainer.state.info.num_outputs
    active = strategy.units.ages[-1] != 0
    for k, experience in enumerate(state.stream.experiences):
        rows = state.prepare(experience.load().rows(torch.arange(20)))
        found = strategy.eval_forward(state, rows).logits.argmax(1).tolist()
        for row, said in enumerate(found):
            hidden = (state.model(rows).hidden[row] * active).detach()
            near = []
            for label, kept in strategy.classes.items():
                if setting == TASK and label // num != k:
                    continue
                units = kept["mask"]
                for vector in kept["vectors"]:
                    a, b = hidden[units], vector[units]
                    near.append(
                        (float((a / a.norm().clamp(min=1e-12) - b / b.norm().clamp(min=1e-12)).norm()), label % num)
                    )
            near.sort()
            if len(near) > 5 and near[5][0] - near[4][0] < 1e-9:
                continue  # who is the fifth is open
            best = near[:5]
            counts = {label: sum(each == label for _, each in best) for _, label in best}
            most = [label for label, count in counts.items() if count == max(counts.values())]
            assert said in most
            if len(most) > 1:
                assert min(d for d, label in best if label == said) == min(d for d, label in best if label in most)


def test_convolutions_and_columns_of_flattened_maps(lab):
    """28x28 digits stand-in: a convolutional network trains, its connections stay conserved and absent ones zero."""
    stream = split(num_experiences=5, setting="class_incremental", train_rows=200, eval_rows=50).first(2)
    spy = Spy(phase_epochs=1, stored_rows=5)
    _, trainer = lab.run([spy], stream, backbone=partial(Convnet, hidden=20), epochs=2)
    layers = layers_of(trainer.state.model, "sharp")
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "Conv2d", "Linear"]
    for layer, mask in zip(layers, spy.units.masks, strict=True):
        assert (layer.weight[~as_weights(mask, layer.weight)] == 0).all()
    counts = {tuple(int(mask.sum()) for mask in units["masks"]) for units, *_ in spy.notes}
    first = [int(mask.sum()) for mask in spy.notes[0][0]["masks"]]
    assert all(now <= then for count in counts for now, then in zip(count, first, strict=True))


def test_bad_input_is_refused(lab):
    for name, value in (("prune", 1.0), ("floor", 1.5), ("cut", -1), ("stored_rows", 0), ("temperature", 0)):
        with pytest.raises(UserError, match=rf"sharp\.{name} is {value}"):
            Sharp(**{name: value})
    with pytest.raises(UserError, match=r"sharp\.cut is 2; Deep has 2 stages, of which one must be late"):
        lab.run([Sharp(cut=2)], CLASS, backbone=Deep)
    stream = split(num_experiences=5, setting="class_incremental", train_rows=100, eval_rows=50)
    with pytest.raises(
        UserError, match=r"sharp rewires stages of one linear or convolutional layer each.*Resnet18 has"
    ):
        lab.run([Sharp()], stream, backbone=Resnet18)
    with pytest.raises(UserError, match="stage 1 of Mlp has nothing"):
        lab.run([Sharp()], stream, backbone=partial(Mlp, hidden=[]))
