"""Replay by percent: exact accounting of rows, and the plain loss of a step."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.config import TrainerConfig
from cl.core import Batch, Setting, TensorData, UserError
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies import token_replay as module
from strategies.gere import Gere
from strategies.joint import Joint
from strategies.replay import Replay
from strategies.token_replay import TokenReplay

TEXT = Setting.CONTINUAL_PRETRAINING
ROWS = 192


def trained(lab, strategies, stream=None, **config):
    recorder = lab.Recorder()
    trainer = Trainer(
        stream or toy_stream(TEXT),
        lambda info: ToyNet(info).double(),
        [*(strategies if isinstance(strategies, list) else [strategies]), recorder],
        optimizer=partial(torch.optim.SGD, lr=lab.lr),
        config=TrainerConfig(**({"epochs": 1, "batch_size": lab.batch_size, "device": "cpu"} | config)),
    )
    trainer.run()
    return recorder, trainer


def replayed(steps):
    """(experience of the step, experience of the row) of every replayed row."""
    return Counter(
        (step.experience, origin)
        for step in steps
        for part in step.batch.parts[1:]
        for origin in step.batch.experience_id[part.rows].tolist()
    )


@pytest.mark.parametrize("rate", [1.0, 5.0, 20.0, 50.0])
@pytest.mark.parametrize("batch_size", [16, 7])
def test_the_share_of_tokens_is_the_rate(lab, rate, batch_size):
    recorder, trainer = trained(lab, TokenReplay(rate), batch_size=batch_size)
    found = replayed(recorder.steps)
    wanted = ROWS * rate / (100 - rate)
    assert {k: n for k, n in found.items() if k[0] == 1} == ({(1, 0): int(wanted + 1e-9)} if wanted >= 1 else {})
    # in the last experience two domains take equal parts; what was owed at its beginning is carried over
    carried = wanted - int(wanted + 1e-9)
    assert abs(found[2, 0] - (wanted / 2 + carried)) < 1 and abs(found[2, 1] - wanted / 2) < 1
    assert trainer.strategies[0].replayed == {k: n for k in (0, 1) if (n := found[1, k] + found[2, k])}
    done = 0
    for number, step in enumerate(s for s in recorder.steps if s.experience == 1):
        # over any stretch from the switch on, to within one row
        done += len(step.batch) - step.batch.num_current
        current = min(batch_size * (number + 1), ROWS)
        assert 0 <= current * rate / (100 - rate) - done + 1e-6 < 1 + 1e-6


def test_each_domain_has_its_own_rate(lab):
    recorder, _ = trained(lab, TokenReplay({"toy 0": 10.0, "toy 1": 30.0, "toy 2": 50.0}, capacity=60))
    found = replayed(recorder.steps)
    # beside domain 1 only domain 0 is past: 10 of 90; beside domain 2 both are: 10 and 30 of 60
    assert found == {(1, 0): int(ROWS / 9), (2, 0): int(ROWS / 9 % 1 + ROWS / 6), (2, 1): ROWS // 2}


def test_joint_training_has_nothing_to_replay(lab):
    stream = Joint().plan(toy_stream(TEXT))
    recorder, _ = trained(lab, TokenReplay(25), stream)
    assert not replayed(recorder.steps)


def test_a_domain_that_returns_is_not_replayed_into_itself(lab):
    stream = toy_stream(TEXT)
    first, second, _ = stream.experiences
    again = type(first)(2, "again", "toy 0", first.load, first.num_samples)
    stream = replace(stream, experiences=[first, second, again])
    recorder, trainer = trained(lab, TokenReplay(25.0), stream)
    assert {key for key in replayed(recorder.steps) if key[0] == 2} == {(2, 1)}
    assert len(trainer.strategies[0].buffer.members) == 2


def mixture(*later):
    """A stream whose first experience is of toy 0 and toy 1, which are new together, and others by their domains."""
    stream = toy_stream(TEXT)
    alone = [each.load() for each in stream.experiences]

    def load(domains):
        # rows keep the experience that they were first seen in
        return TensorData.concat([replace(alone[n], experience_id=2 if n == 2 else 0) for n in domains])

    experiences = [
        replace(
            stream.experiences[0],
            id=k,
            domain="+".join(f"toy {n}" for n in domains),
            practises=tuple(f"toy {n}" for n in domains) if len(domains) > 1 else (),
            load=partial(load, domains),
            num_samples=ROWS * len(domains),
        )
        for k, domains in enumerate([(0, 1), *later])
    ]
    return replace(stream, info=replace(stream.info, num_experiences=len(experiences)), experiences=experiences)


def domains_replayed(steps, experience):
    """How many replayed rows are of toy 0, 1 and 2, by what is in them."""
    owner = {}
    for k, each in enumerate(toy_stream(TEXT).experiences):
        data = each.load()
        owner |= dict.fromkeys(map(tuple, torch.cat([data.inputs, data.targets], dim=1).tolist()), k)
    found = Counter()
    for step in (step for step in steps if step.experience == experience):
        for part in step.batch.parts[1:]:
            rows = step.batch[part.rows]
            found.update(owner[tuple(row)] for row in torch.cat([rows.inputs, rows.targets], dim=1).tolist())
    return [found[k] for k in range(3)]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_mixture_is_past_as_long_as_one_of_its_domains_is(lab, alone):
    """Its rows are not told apart; what is stored while one of the domains is alone is known to be of that one."""
    recorder, trainer = trained(lab, TokenReplay(50.0), mixture((alone,), (2,), (0, 1)))
    again, later, last = (domains_replayed(recorder.steps, k) for k in (1, 2, 3))
    assert sum(again) == sum(later) == ROWS
    # half of the mixture, however much of the running domain was stored meanwhile
    assert 0.44 * ROWS < again[alone] < 0.56 * ROWS
    # which is past as well in the end
    assert later[alone] > 0.56 * ROWS
    assert last == [0, 0, 2 * ROWS]
    assert sorted(trainer.strategies[0].buffer.members) == [0, 2]


def test_a_mixture_has_the_share_of_those_of_its_domains_that_are_past(lab):
    """Toy 1 and toy 2 are while toy 0 runs; the name of the mixture is no domain beside them."""
    recorder, _ = trained(lab, TokenReplay(50.0), mixture((0,), (2,), (0,)))
    last = {origin: count for (k, origin), count in replayed(recorder.steps).items() if k == 3}
    assert last == {0: ROWS // 2, 2: ROWS // 2}


def test_domains_that_come_back_one_by_one_are_told_apart_by_their_rows(lab):
    """Of a mixture with an old domain only the new one is in its own rows."""
    stream = toy_stream(TEXT)
    first, second, _ = stream.experiences
    both = TensorData.concat([first.load(), second.load()])
    mixed = replace(second, practises=("toy 0", "toy 1"), load=lambda: both, num_samples=2 * ROWS)
    again = replace(second, id=2, name="again")
    recorder, _ = trained(lab, TokenReplay(25.0), replace(stream, experiences=[first, mixed, again]))
    assert replayed(recorder.steps) == {(2, 0): ROWS // 3}


@pytest.mark.parametrize(("rates", "wanted"), [({"toy 0": 20.0}, 0), ({"toy 0": 10.0, "toy 1": 20.0}, 20)])
def test_each_domain_of_a_mixture_has_its_own_rate(lab, rates, wanted):
    recorder, _ = trained(lab, TokenReplay(rates, capacity=60), mixture((0,), (2,)))
    total = sum(rates.values())
    assert replayed(recorder.steps) == {
        k: n
        for k, n in {(1, 0): ROWS * wanted // (100 - wanted), (2, 0): int(ROWS * total / (100 - total))}.items()
        if n
    }


def check(lab, before=(), behind=()):
    """One mean over all tokens of the step."""
    recorder, _ = trained(lab, [*before, TokenReplay(20.0, capacity=50), *behind])
    model = deepcopy(recorder.start)
    for step in recorder.steps[::5]:
        model.load_state_dict(step.before)
        rows = step.batch
        loss = F.cross_entropy(model(rows).logits.flatten(0, 1), rows.targets.flatten())
        gradients = lab.gradient(model, loss)
        lab.close(step.after, {name: p - lab.lr * gradients[name] for name, p in step.before.items()}, 1e-5, 1e-6)


def test_a_token_is_a_token(lab):
    check(lab)


@pytest.mark.parametrize("kind", [partial(Gere, "ce", general_batch_size=4), partial(Replay, 40, 7, average="row")])
def test_a_token_is_a_token_beside_others_who_add_rows(lab, kind):
    check(lab, before=[kind()])
    check(lab, behind=[kind()])


def test_the_oracle_needs_the_weight(lab, monkeypatch):
    whole = module.added
    monkeypatch.setattr(module, "added", lambda *args: whole(*args, 1.0))
    lab.dies(lambda: check(lab))


def test_a_step_does_not_depend_on_how_it_is_cut(lab):
    after = [
        trained(lab, TokenReplay(20.0), batch_size=16 // cuts, accumulation=cuts)[0].steps[-1].after for cuts in (1, 4)
    ]
    lab.close(after[1], after[0], 1e-5, 1e-6)


def test_stored_rows_are_those_of_the_stream_in_equal_shares(lab):
    _, trainer = trained(lab, TokenReplay(10.0, capacity=60))
    buffer = trainer.strategies[0].buffer
    assert buffer.columns["experience_id"].bincount().tolist() == [20, 20, 20]
    rows = buffer.rows(torch.arange(60))
    for row in range(60):
        source = trainer.state.stream.experiences[int(rows.experience_id[row])].load()
        same: Batch = source.rows(rows.sample_ids[row : row + 1])
        assert torch.equal(same.inputs[0], rows.inputs[row]) and torch.equal(same.targets[0], rows.targets[row])


@pytest.mark.parametrize(("count", "distinct"), [(19, 19), (20, 20), (21, None)])
def test_rows_are_distinct_while_there_are_enough(lab, count, distinct):
    _, trainer = trained(lab, strategy := TokenReplay(10.0, capacity=60))
    strategy.planned = {1: count}
    rows = strategy._drawn(trainer.state)
    assert rows.experience_id.tolist() == [1] * count
    assert distinct in (None, len(set(rows.sample_ids.tolist())))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 100.0}, "token_replay.rate is 100.0; it must be below 100 percent"),
        ({"rate": -1}, "token_replay.rate is -1"),
        ({"rate": {"toy 0": 60, "toy 1": 40}}, "below 100 percent"),
        ({"rate": {"news": 1}}, "names 'news', no domain of stream toy_continual_pretraining; they are toy 0, toy 1"),
        ({"capacity": 0}, "token_replay.capacity is 0"),
        ({"capacity": 2}, "token_replay.capacity is 2; it must be at least 3, one row for each domain of the stream"),
    ],
)
def test_bad_values_are_one_sentence(lab, options, words):
    with pytest.raises(UserError) as error:
        trained(lab, TokenReplay(**options))
    assert words in str(error.value) and "\n" not in str(error.value)
