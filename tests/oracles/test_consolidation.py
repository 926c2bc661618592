"""Consolidation: the control law by hand, and a plain loop with two stores beside it."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2

from cl.buffers.fifo import Fifo
from cl.core import Batch, Setting, UserError
from cl.seeding import Seeds
from cl.state import TrainState
from cl.testing import ToyNet, toy_stream
from cl.testing.probe import train
from cl.tracking.points import points
from strategies._consolidation_control import Control, Forgetting
from strategies.consolidation import Consolidation
from strategies.replay import Replay

SIZES = {"ring_capacity": 24, "long_capacity": 30}


# the law


def law(phi, phi_old, phi_last, weight, long_frac, target=0.05, gain=2.0, most=0.5):
    """The specification's lines, one after the other."""
    log_weight = min(max(math.log(weight) + gain * (phi - target), math.log(0.05)), math.log(2.0))
    sign = (phi_old - phi_last > 0) - (phi_old - phi_last < 0)
    return math.exp(log_weight), most * min(max(phi / (phi + target), 0), 1), min(max(long_frac + 0.1 * sign, 0.2), 0.8)


@pytest.mark.parametrize("phi", [0.0, 0.01, 0.05, 0.3, 4.0, 1e4])
@pytest.mark.parametrize(("old", "last"), [(0.2, 0.1), (0.1, 0.2), (0.1, 0.1)])
def test_law(phi, old, last):
    control = Control(0.9, 0.25, 0.75)
    for _ in range(3):
        wanted = law(phi, old, last, control.weight, control.long_frac)
        control.update(phi, old, last, 0.05, 2.0, 0.5)
        assert (control.weight, control.share, control.long_frac) == pytest.approx(wanted, rel=1e-12)


def test_law_by_hand():
    """phi = 0.15: weight e^(2 * 0.1); share 0.5 * 0.15 / 0.2; at the target the weight stands and the share is half."""
    control = Control(1.0, 0.25, 0.5)
    control.update(0.15, 0.2, 0.1, 0.05, 2.0, 0.5)
    assert (control.weight, control.share, control.long_frac) == pytest.approx((1.221402758, 0.375, 0.6))
    control = Control(1.0, 0.0, 0.5)
    control.update(0.05, 0.0, 0.0, 0.05, 2.0, 0.5)
    assert (control.weight, control.share, control.long_frac) == pytest.approx((1.0, 0.25, 0.5))
    for _ in range(50):
        control.update(0.0, 0.0, 1.0, 0.05, 2.0, 0.5)
    assert (control.weight, control.share, control.long_frac) == pytest.approx((0.05, 0.0, 0.2))
    for _ in range(50):
        control.update(3.0, 1.0, 0.0, 0.05, 2.0, 0.5)
    assert (control.weight, control.long_frac) == pytest.approx((2.0, 0.8))


def test_forgetting_is_the_distance_from_the_best_so_far():
    seen = Forgetting()
    assert seen.of([3.0, None, 5.0], [], 100) == {}
    assert seen.of([2.0, 4.0, 4.5], [0], 100) == {0: 0.0}
    assert seen.of([2.5, 3.0, 4.0], [0, 1], 100) == {0: 0.5, 1: 0.0}
    assert seen.of([2.25, 3.5, None], [0, 1, 2], 100) == {0: 0.25, 1: 0.5}
    # other rows, other losses
    assert seen.of([9.0, 9.0, 9.0], [0, 1], None) == {}
    assert seen.of([9.5, 9.0, 9.0], [0, 1], None) == {0: 0.5, 1: 0.0}


# a run


def stated(**options):
    return Consolidation(**{**SIZES, "most": 0.5} | options)


class Watched(Consolidation):
    """Notes the controller before every step, what was told to it, and the steps at which drawn rows were stored."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.told, self.ages = [], [], []

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self.seen.append((self.control.weight, self.control.share, self.control.long_frac, self.has_left))
        return super().on_batch(state, batch)

    def on_evaluation(self, state, row, max_rows):
        super().on_evaluation(state, row, max_rows)
        control = self.control
        self.told.append((state.experience.id, list(row), (control.weight, control.share, control.long_frac)))


Watched.name = "consolidation"


def controls_again(told, signs):
    """The controller from the measurements alone."""
    weight, share, long_frac, lowest = 1.0, 0.25, 0.5, {}
    for experience, row, found in told:
        losses = {j: signs * value for j, value in enumerate(row) if value is not None}
        phis = [max(0.0, losses[j] - lowest[j]) for j in range(experience) if j in losses and j in lowest]
        for j, loss in losses.items():
            lowest[j] = min(loss, lowest.get(j, math.inf))
        if phis:
            old = sum(phis[:-1]) / len(phis[:-1]) if len(phis) > 1 else phis[-1]
            weight, share, long_frac = law(sum(phis) / len(phis), old, phis[-1], weight, long_frac)
        assert found == pytest.approx((weight, share, long_frac), rel=1e-9)
    return weight, share, long_frac


@pytest.mark.parametrize(
    ("setting", "signs"), [(Setting.CONTINUAL_PRETRAINING, 1), (Setting.DOMAIN_INCREMENTAL, -1)], ids=str
)
def test_controller_follows_what_is_measured(lab, setting, signs):
    """Losses in nats, and shares of right answers with their sign turned."""
    strategy = Watched(**SIZES)
    recorder, trainer = lab.run([strategy], setting, eval_every=4, evaluate="seen")
    assert len(strategy.told) == len(recorder.steps) // 4
    last = controls_again(strategy.told, signs)
    assert (strategy.control.weight, strategy.control.share, strategy.control.long_frac) == pytest.approx(last)
    assert len({control for _, _, control in strategy.told}) > 3, "the controller never moved"
    traces = [trace for trace in trainer.ledger.result.traces if trace[0] == "consolidation_weight"]
    assert [value for _, _, value in traces] == [control[0] for _, _, control in strategy.told]
    assert [step for _, step, _ in traces] == list(range(4, len(recorder.steps) + 1, 4))
    curve = [p for p in points(trainer.ledger.result) if p.name == "train/consolidation_weight"]
    assert [(p.step, p.value) for p in curve] == [(step, value) for _, step, value in traces]


def test_all_but_the_last_are_the_old_ones(lab, monkeypatch):
    """Four domains that are left: the mean of the first three against the fourth."""
    _, trainer = lab.run([strategy := stated()], max_steps=1, epochs=None)
    phis, told = {0: 0.1, 1: 0.6, 2: 0.2, 3: 0.7}, []
    monkeypatch.setattr(strategy.forgetting, "of", lambda *_: phis)
    monkeypatch.setattr(strategy.control, "update", lambda *numbers: told.append(numbers[:3]))
    strategy.on_evaluation(trainer.state, [0.0] * 3, None)
    assert told == [pytest.approx((0.4, 0.3, 0.7))]


def test_a_step_is_the_same_in_four_pieces(lab):
    """Of which some show more stored rows than others: 6 beside 16."""
    ends = []
    for accumulation in (1, 4):
        cut = {"batch_size": 16 // accumulation, "accumulation": accumulation}
        _, trainer = lab.run([stated(is_fixed=True, most=0.8)], max_steps=4, epochs=None, **cut)
        ends.append(lab.weights(trainer.state.model))
    lab.close(ends[1], ends[0], 1e-5, 1e-8)


def test_rows_drawn_are_what_the_controller_asks_for(lab):
    strategy = Watched(**SIZES)
    recorder, _ = lab.run([strategy], eval_every=4)
    for number, (step, (weight, share, _, has_left)) in enumerate(zip(recorder.steps, strategy.seen, strict=True)):
        parts = step.batch.parts_of("consolidation")
        wanted = round(lab.batch_size * share) if has_left else 0
        assert has_left == (step.experience > 0)
        assert sum(map(len, parts)) == wanted, f"step {number}"
        assert all(part.weight == weight for part in parts)
    assert any(step.batch.parts_of("consolidation") for step in recorder.steps)


def check_plain_loop(lab, setting):
    """loss = CE(current) + weight CE(all replayed rows together)."""
    strategy = Watched(**SIZES)
    recorder, _ = lab.run([strategy], setting)
    model = deepcopy(recorder.start)
    for step, (weight, *_) in zip(recorder.steps, strategy.seen, strict=True):
        current, *replayed = [step.batch[part.rows] for part in step.batch.parts]
        loss = lab.label_loss(model, current) + sum(weight * lab.label_loss(model, rows) for rows in replayed)
        gradients = lab.gradient(model, loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model))


def test_consolidation_is_the_plain_loop(lab):
    check_plain_loop(lab, Setting.TASK_INCREMENTAL)


def test_the_oracle_needs_the_weight(lab, monkeypatch):
    whole = Batch.extended
    monkeypatch.setattr(
        Batch, "extended", lambda self, rows, source, owner, weight=1.0: whole(self, rows, source, owner, 0.5 * weight)
    )
    lab.dies(lambda: check_plain_loop(lab, Setting.TASK_INCREMENTAL))


def test_replay_never_draws_what_is_not_past(lab, monkeypatch):
    """Invariant 6: every drawn row was stored in an earlier step, and shown to the model before."""
    strategy, drawn = stated(long_frac=0.5), []
    for buffer in (strategy.ring, strategy.reservoir):
        take = buffer.rows
        monkeypatch.setattr(
            buffer, "rows", lambda slots, take=take, of=buffer: drawn.append(of.take("step", slots)) or take(slots)
        )
    before = []

    class Clock(Replay):
        """Notes the step of every draw; placed after the strategy."""

        def on_batch(self, state, batch):
            before.extend((state.step, each) for each in drawn)
            drawn.clear()
            return batch

    recorder, _ = lab.run([strategy, Clock(1, weight=0.0)])
    assert len(before) > 20
    assert all(steps.max() < now for now, steps in before)
    shown = set()
    for step in recorder.steps:
        rows = lab.rows_of(step.batch)
        current = step.batch.num_current
        assert set(rows[current:]) <= shown
        shown |= set(rows[:current])


def test_both_stores_give_their_share(lab):
    """ceil(long_frac B_R) rows from the reservoir; the others from the ring, which holds the newest rows only."""
    strategy = stated(long_frac=0.3, is_fixed=True, most=1.0)
    recorder, _ = lab.run([strategy])
    newest = []
    for step in recorder.steps:
        rows = lab.rows_of(step.batch)
        current, replayed = rows[: step.batch.num_current], rows[step.batch.num_current :]
        if step.experience:
            num_long = math.ceil(0.3 * len(replayed))
            assert len(replayed) == 8
            assert num_long == 3
            assert set(replayed[num_long:]) <= set(newest[-SIZES["ring_capacity"] :])
        newest += current
    assert any(row[0] == 0 for step in recorder.steps if step.experience == 2 for row in lab.rows_of(step.batch)), (
        "the reservoir must reach back to the first experience"
    )


@pytest.mark.parametrize(
    ("practised", "trained", "wanted"),
    [
        # domain 0 comes back, and is left later than 1
        ([[0], [1], [0], [2]], [0, 1, 0, 2], [[], [0], [1], [1, 0]]),
        # mixtures: what they share with the running one is not left
        ([[0, 1], [1, 2], [0]], [-1, -1, 0], [[], [0], [1, 2]]),
        # one that nobody measures may have taught all, and is not known to teach any
        ([], [0, -1, 1], [[], [0], [0, 2]]),
    ],
)
def test_domains_are_left_in_the_order_of_their_last_experience(practised, trained, wanted):
    stream = SimpleNamespace(practised_domains=practised, trained_domains=trained, eval_sets=[None] * 3)
    found = [
        Consolidation._left(SimpleNamespace(experience=SimpleNamespace(id=now), stream=stream))
        for now in range(len(trained))
    ]
    assert found == wanted


@pytest.mark.parametrize("start", [0.2, 0.3, 0.5, 0.8])
def test_a_share_of_so_many_tenths_is_so_many_rows_of_ten(start):
    """However the controller came there, up or down."""
    for sign in (1, -1):
        strategy = stated(long_frac=start)
        strategy.has_left, strategy.reservoir.filled, strategy.ring.filled = True, 30, 24
        tenths = round(10 * start)
        for _ in range(8):
            strategy.control.update(0.05, max(sign, 0), max(-sign, 0), 0.05, 2.0, most=2.0)
            tenths = min(max(tenths + sign, 2), 8)
            assert strategy.num_replayed(10) == (tenths, 10 - tenths)


def test_ring_holds_the_newest_rows_in_order():
    ring, generator = Fifo(5), torch.Generator()
    for low in (0, 3, 6, 9):
        ids = torch.arange(low, low + 3)
        ring.add(Batch(ids, ids, ids, ids, raw=ids), generator)
    assert sorted(ring.columns["sample_ids"].tolist()) == [7, 8, 9, 10, 11]
    ids = torch.arange(20, 40)
    ring.add(Batch(ids, ids, ids, ids, raw=ids), generator)
    assert sorted(ring.columns["sample_ids"].tolist()) == [35, 36, 37, 38, 39]
    assert len(ring) == 5


def test_reservoir_keeps_every_row_of_the_past_as_likely():
    """600 streams of 60 rows, 12 of which stay: a chi-square test over their positions."""
    kept, trials = torch.zeros(60), 600
    for trial in range(trials):
        strategy = Consolidation(ring_capacity=3, long_capacity=12)
        state = SimpleNamespace(step=1, seeds=Seeds(trial))
        for ids in torch.arange(60).split(7):
            strategy.on_step_end(state, Batch(ids, ids, ids, ids, raw=ids), None)
        kept[strategy.reservoir.columns["sample_ids"]] += 1
        assert sorted(strategy.ring.columns["sample_ids"].tolist()) == [57, 58, 59]
    expected = trials * 12 / 60
    statistic = float(((kept - expected) ** 2).sum() / (expected * (1 - 12 / 60)))
    assert chi2.sf(statistic * 59 / 60, 59) > 1e-3


@pytest.mark.parametrize("setting", [Setting.CONTINUAL_PRETRAINING, Setting.CLASS_INCREMENTAL], ids=str)
def test_goes_on_exactly_between_two_measurements(setting, tmp_path):
    """Stores, generators and controller; what was traced before is not traced again."""
    whole = train(setting, [stated()], eval_every=5)
    first = train(setting, [stated()], eval_every=5, run_dir=tmp_path, stop_at=48)
    assert first.result.status == "interrupted"
    second = train(setting, [stated()], eval_every=5, run_dir=tmp_path, resume=True)
    assert first.losses + second.losses == whole.losses
    assert second.result.R == whole.result.R
    assert second.result.traces == whole.result.traces
    assert len({value for name, _, value in whole.result.traces if name == "consolidation_weight"}) > 3


def test_fixed_stays_where_it_is(lab):
    strategy = stated(is_fixed=True, weight=3.0, long_frac=1.0)
    _, trainer = lab.run([strategy], eval_every=4)
    assert (strategy.control.weight, strategy.control.share, strategy.control.long_frac) == (3.0, 0.25, 1.0)
    assert not strategy.needs_evaluation
    assert {name for name, _, _ in trainer.ledger.result.traces} >= {"consolidation_forgetting", "consolidation_weight"}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"ring_capacity": 0}, "consolidation.ring_capacity is 0"),
        ({"long_capacity": 2.5}, "consolidation.long_capacity is 2.5"),
        ({"target": 0.0}, "consolidation.target is 0.0; it must be a finite number above 0"),
        ({"gain": -1}, "consolidation.gain is -1"),
        ({"weight": 5.0}, "consolidation.weight is 5.0; it must be from 0.05 to 2, unless is_fixed"),
        ({"long_frac": 1.5}, "consolidation.long_frac is 1.5; it must be a number from 0 to 1"),
        ({"is_fixed": "yes"}, "consolidation.is_fixed is 'yes'"),
    ],
)
def test_refuses_in_one_sentence(options, wanted):
    with pytest.raises(UserError, match=wanted):
        Consolidation(**options)


@pytest.mark.slow
def test_refuses_a_loop_that_measures_nothing():
    pytest.importorskip("avalanche")
    from cl.interop.avalanche import train_in_template

    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "epochs": 1, "batch_size": 16}
    with pytest.raises(UserError, match="consolidation follows measurements, which no Avalanche template makes"):
        train_in_template(toy_stream(Setting.DOMAIN_INCREMENTAL), ToyNet, [stated()], **options)
    train_in_template(toy_stream(Setting.DOMAIN_INCREMENTAL), ToyNet, [stated(is_fixed=True)], **options)
