"""Module sensitivity against numbers by hand, and the running version of the strategies against the whole record."""

import math
from types import SimpleNamespace

import pytest
import torch

from cl.core import Setting
from cl.hooks import Strategy
from cl.metrics.sensitivity import Change, mean_change, module_of, ranked, sensitivity
from cl.testing import train
from strategies._modules import SwitchTracker


def test_change_is_the_mean_over_weights():
    before = {"a.weight": torch.zeros(2, 2), "a.bias": torch.ones(2), "b": torch.tensor(1.0)}
    after = {"a.weight": torch.tensor([[1.0, -3.0], [0.0, 0.0]]), "a.bias": torch.tensor([1.0, 3.0]), "b": 0.5}
    assert mean_change(before, after) == {"a.weight": 1.0, "a.bias": 1.0, "b": 0.5}
    assert mean_change(before, after, module_of) == {"a": 1.0, "": 0.5}


def test_sensitivity_by_hand():
    """(4 + 8) / 2 after the switches, (1 + 2 + 3) / 3 in late intervals; the first experience has no switch."""
    run = [Change(0, 0, {"a": 100.0}), Change(0, 1, {"a": 50.0}), Change(0, 2, {"a": 1.0})]
    run += [Change(1, 0, {"a": 4.0}), Change(1, 1, {"a": 60.0}), Change(1, 2, {"a": 2.0})]
    run += [Change(2, 0, {"a": 8.0}), Change(2, 1, {"a": 70.0}), Change(2, 2, {"a": 3.0})]
    assert sensitivity(run, late_from=2) == {"a": 3.0}
    assert sensitivity(run) == {"a": pytest.approx(6 * 6 / (50 + 1 + 60 + 2 + 70 + 3))}


def test_what_cannot_be_said_is_nan():
    def value(*changes):
        return sensitivity([Change(k, i, {"a": c}) for k, i, c in changes])["a"]

    assert math.isnan(value((0, 0, 1.0), (0, 1, 1.0))), "no switch"
    assert math.isnan(value((0, 0, 1.0), (1, 0, 1.0))), "nothing late"
    assert math.isnan(value((1, 0, 0.0), (1, 1, 0.0))), "never changed"
    assert value((1, 0, 1.0), (1, 1, 0.0)) == math.inf
    assert sensitivity([]) == {}


def test_ranking():
    assert ranked({"a": 1.0, "b": math.inf, "c": math.nan, "d": 3.0}) == ["b", "d", "a"]


class Tracking(Strategy):
    """The running tracker beside all snapshots of a run."""

    settings = frozenset(Setting)

    def __init__(self, every):
        self.tracker, self.every, self.changes = SwitchTracker(every), every, []

    def on_experience_start(self, state):
        self.tracker.enter(state)
        self.taken, self.before = 0, self._weights(state)

    def on_step_end(self, state, batch, output):
        self.tracker.step(state)
        self.taken += 1
        if self.taken % self.every == 0:
            now = self._weights(state)
            change = mean_change(self.before, now, module_of)
            self.changes.append(Change(state.experience.id, self.taken // self.every - 1, change))
            self.before = now

    def _weights(self, state):
        return {name: p.detach().clone() for name, p in state.parameters().items()}


@pytest.mark.parametrize("every", [6, 7, 12])
def test_running_tracker_says_what_the_record_says(every):
    tracking = Tracking(every)
    train(Setting.CLASS_INCREMENTAL, [tracking])
    values = sensitivity(tracking.changes)
    assert tracking.tracker.ranking() == ranked(values) and len(values) == 2
    sums, counts = tracking.tracker.sums, tracking.tracker.counts
    for name, value in values.items():
        assert sums["first"][name] / counts["first"] / (sums["late"][name] / counts["late"]) == pytest.approx(value)


def test_tracker_leaves_out_an_interval_in_which_something_else_happened():
    model = torch.nn.Linear(1, 1, bias=False)
    state = SimpleNamespace(
        model=model, parameters=lambda: dict(model.named_parameters()), experience=SimpleNamespace(id=1)
    )
    tracker = SwitchTracker(2)
    tracker.enter(state)
    for step, moved in enumerate((1.0, 1.0, 1.0, 99.0, 3.0, 3.0)):
        with torch.no_grad():
            model.weight += moved
        if step == 3:
            tracker.interrupt()
        tracker.step(state)
    assert tracker.counts == {"first": 1, "late": 1}
    assert tracker.sums["first"][""] == pytest.approx(2.0) and tracker.sums["late"][""] == pytest.approx(6.0)
