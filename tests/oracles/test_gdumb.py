"""GDumb: a sampler checked against a dictionary of lists, and training that starts anew on what it holds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cl.core import Batch, Setting, UserError
from cl.seeding import Seeds
from cl.testing import equal, toy_stream, train
from strategies.gdumb import Gdumb, GreedyBalanced
from strategies.joint import Joint
from streams.scole import scole

CLASS = Setting.CLASS_INCREMENTAL


def rows_with(targets):
    labels = torch.tensor(targets)
    ids = torch.arange(len(labels))
    return Batch(ids, labels, torch.zeros(len(labels), dtype=torch.int64), ids, raw=ids[:, None])


def filled(capacity, *batches, seed=0):
    buffer, generator = GreedyBalanced(capacity), torch.Generator().manual_seed(seed)
    for targets in batches:
        buffer.add(rows_with(targets), generator)
    return buffer


def counts(buffer):
    return Counter(buffer.rows(torch.arange(len(buffer))).targets.tolist())


def plain_counts(capacity, targets):
    """The rule, on numbers of rows only."""
    held, num = Counter(), 0
    for label in targets:
        held[label] += 0
        if num < capacity:
            held[label], num = held[label] + 1, num + 1
        elif held[label] < capacity / len(held):
            most = max(held, key=lambda c: held[c])
            held[most] -= 1
            held[label] += 1
    return +held


@pytest.mark.parametrize("capacity", [3, 10, 24, 50])
def test_counts_follow_the_rule(capacity):
    generator = torch.Generator().manual_seed(capacity)
    for _ in range(20):
        targets = [int(c) for c in torch.randint(5, (60,), generator=generator)] + [5] * 30 + [0] * 10
        buffer = filled(capacity, targets[:37], targets[37:])
        # ties between largest classes may be broken either way, so compare how many classes have how many
        wanted = plain_counts(capacity, targets)
        assert sorted(counts(buffer).values()) == sorted(wanted.values())
        assert len(buffer) == min(capacity, len(targets))


def test_shares_are_equal_once_every_class_had_enough():
    assert counts(filled(12, [0] * 50, [1] * 50, [2] * 50, [3] * 50)) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert set(counts(filled(10, [0, 1, 2] * 50)).values()) == {3, 4}
    # a class that ran out leaves its room to the others
    assert counts(filled(12, [0] * 50, [1] * 2)) == {0: 10, 1: 2}


def test_early_rows_of_a_class_stay():
    buffer = filled(6, [0, 0, 0, 1, 1, 1] + [0, 1] * 20)
    assert sorted(buffer.rows(torch.arange(6)).sample_ids.tolist()) == [0, 1, 2, 3, 4, 5]


def test_who_makes_room_is_drawn():
    """Half of the first class must go; over seeds every one of its rows does about as often."""
    kept = Counter()
    for seed in range(300):
        buffer = filled(8, [0] * 8, [1] * 4, seed=seed)
        rows = buffer.rows(torch.arange(8))
        kept.update(rows.sample_ids[rows.targets == 0].tolist())
    assert sum(kept.values()) == 300 * 4
    assert all(abs(kept[i] - 150) < 5 * (300 * 0.25) ** 0.5 for i in range(8))


def test_the_oracle_needs_the_shares(monkeypatch, lab):
    monkeypatch.setattr(GreedyBalanced, "_new_slot", lambda self, members, uniform: ClassLast.slot(self, members))
    lab.dies(lambda: test_counts_follow_the_rule(24))


class ClassLast:
    """A mutation: the newest row makes room, whatever its class."""

    @staticmethod
    def slot(buffer, members):
        if buffer.filled < buffer.capacity:
            buffer.filled += 1
            members.append(buffer.filled - 1)
        else:
            members.append(max(buffer.members.values(), key=lambda slots: max(slots, default=-1)).pop())
        return members[-1]


# the learner


def test_each_experience_trains_from_the_first_weights_on_the_buffer_only(lab):
    gdumb = Gdumb(capacity=48)
    recorder, trainer = lab.run([gdumb], CLASS)
    assert [step.experience for step in recorder.steps] == [0] * 3 + [1] * 3 + [2] * 3
    for number in (0, 3, 6):
        lab.close(recorder.steps[number].before, lab.weights(recorder.start), rtol=0, atol=0)
    for k in range(3):
        rows = Batch.cat([step.batch for step in recorder.steps if step.experience == k])
        assert Counter(rows.targets.tolist()) == dict.fromkeys(range(2 * k + 2), 48 // (2 * k + 2))
        assert len(set(lab.rows_of(rows))) == 48, "each row once per epoch, with its own identity"
    held = set(lab.rows_of(gdumb.buffer.rows(torch.arange(48))))
    assert set(lab.rows_of(Batch.cat([step.batch for step in recorder.steps[6:]]))) == held
    assert trainer.state.info.num_experiences == 3


def test_weights_are_those_of_a_plain_run_on_the_buffer(lab):
    """SGD with momentum from the first weights over the recorded batches of the last experience."""
    from functools import partial

    recorder, trainer = lab.run(
        [Gdumb(capacity=48)], CLASS, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), epochs=2
    )
    model = recorder.start
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in recorder.steps:
        if step.experience == 2:
            optimizer.zero_grad()
            lab.label_loss(model, step.batch).backward()
            optimizer.step()
    lab.close(lab.weights(trainer.state.model), lab.weights(model))


def test_the_oracle_needs_the_fresh_start(lab, monkeypatch):
    monkeypatch.setattr(Gdumb, "on_experience_start", lambda *_: None)
    lab.dies(lambda: test_weights_are_those_of_a_plain_run_on_the_buffer(lab))


def test_with_room_for_everything_the_last_model_is_as_good_as_joint():
    gdumb = train(CLASS, [Gdumb(capacity=600)])
    joint = train(CLASS, [Joint()])
    assert abs(gdumb.result.metrics["final"] - joint.result.metrics["final"]) < 0.1


def test_number_of_rows_is_known_before_anything_is_loaded():
    planned = Gdumb(capacity=300).plan(toy_stream(CLASS))
    assert [e.num_samples for e in planned.experiences] == [192, 300, 300]
    assert [e.classes for e in planned.experiences] == [tuple(range(2 * k + 2)) for k in range(3)]


def test_it_practises_what_the_buffer_holds():
    assert Gdumb(capacity=300).plan(toy_stream(CLASS)).practised_domains == []
    planned = Gdumb(capacity=300).plan(scole("digits", 3, kind="cycle"))
    assert planned.practised_domains == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_the_buffer_is_a_function_of_the_seed():
    def held(seed):
        gdumb = Gdumb(capacity=40)
        planned = gdumb.plan(toy_stream(CLASS))
        gdumb._seeds = Seeds(seed)
        planned.experiences[1].load()
        return gdumb.buffer.state_dict()

    assert equal(held(0), held(0)) and not equal(held(0), held(1))


def test_capacity_must_hold_every_class():
    with pytest.raises(UserError, match=r"gdumb.capacity is 5; it must be at least 6, one row for each class"):
        train(CLASS, [Gdumb(capacity=5)])
    with pytest.raises(UserError, match=r"gdumb.capacity is 0; it must be an integer of at least 1"):
        Gdumb(capacity=0)
