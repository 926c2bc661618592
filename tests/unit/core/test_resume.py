"""A run that was killed, stopped or damaged goes on as if nothing had happened: losses, R and weights bit for bit."""

import errno
import runpy
from pathlib import Path

import pytest
import torch

from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.observe import Observer
from cl.result import Result
from cl.testing import equal
from cl.testing.probe import train

RESUMABLE = runpy.run_path(str(Path(__file__).with_name("resumable.py")))
trainer_of = RESUMABLE["trainer_of"]

KILLED_AT = ("0", "1", "6", "17", "23", "35", "w1", "w2", "w5")
"""Experiences have 12 steps, checkpoints come every 4: before the first, in between, at the ends, while writing."""


class Watch(Observer):
    """Losses by step; asks for a stop."""

    def __init__(self, trainer_of_run=None, stop_at=None):
        self.losses, self.stop_at = {}, stop_at

    def on_step(self, state, losses, lr):
        self.losses[state.step] = losses
        if state.step == self.stop_at:
            self.trainer.request_stop()


def run(folder, resume=False, stop_at=None, **options):
    watch = Watch(stop_at=stop_at)
    watch.trainer = trainer = trainer_of(folder, [watch], **options)
    result = trainer.run(resume=resume)
    return result, trainer, watch.losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbs."""
    return run(tmp_path_factory.mktemp("whole"))


def assert_same_end(resumed, whole):
    (result, trainer, losses), (expected, undisturbed, every_loss) = resumed, whole
    assert result.status == "done"
    assert result.R == expected.R
    assert result.R_init == expected.R_init
    assert result.within == expected.within
    for name in ("step", "tokens", "classes_seen"):
        assert getattr(trainer.state, name) == getattr(undisturbed.state, name)
    assert losses == {step: every_loss[step] for step in losses}
    assert equal(trainer.state.model.state_dict(), undisturbed.state.model.state_dict())
    assert equal(trainer.state.optimizer.state_dict(), undisturbed.state.optimizer.state_dict())
    states = [[strategy.state_dict() for strategy in one.strategies] for one in (trainer, undisturbed)]
    assert equal(*states)
    cost, expected_cost = (
        {key: one.cost[key] for key in ("forwards", "backwards", "updates")} for one in (result, expected)
    )
    assert cost == expected_cost


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs that were killed with SIGKILL in processes of their own."""
    folder = tmp_path_factory.mktemp("killed")
    RESUMABLE["kill_at"](folder, *KILLED_AT)
    return folder


@pytest.mark.parametrize("at", [at for at in KILLED_AT if at != "w1"])
def test_a_killed_run_goes_on_exactly(killed, whole, at):
    resumed = run(killed / at, resume=True)
    assert_same_end(resumed, whole)
    assert max(resumed[2]) == 35
    assert not list((killed / at).rglob("*.tmp")), "half-written files are cleared"


def test_killed_before_the_first_checkpoint_there_is_nothing_to_go_on_from(killed):
    with pytest.raises(UserError, match=r"holds no readable checkpoint; remove .* and start the run again"):
        run(killed / "w1", resume=True)


@pytest.mark.parametrize("stop_at", [0, 3, 4, 11, 12, 30, 35])
def test_a_stopped_run_goes_on_exactly(tmp_path, whole, stop_at):
    first, _, losses = run(tmp_path, stop_at=stop_at)
    assert max(losses) == stop_at
    if stop_at == 35:
        assert first.status == "done", "there was nothing left to stop"
        return
    assert first.status == Result.load(tmp_path / "result.json").status == "interrupted"
    resumed = run(tmp_path, resume=True)
    assert min(resumed[2]) == stop_at + 1, "a stop loses no step"
    assert_same_end(resumed, whole)


def test_a_run_that_died_while_its_last_experience_was_closed_goes_on_exactly(tmp_path, whole):
    """All steps are taken, and what comes after them is done as if for the first time."""
    run(tmp_path)
    (tmp_path / "checkpoints" / "step-000000036.pt").unlink()
    resumed = run(tmp_path, resume=True)
    assert resumed[2] == {} and resumed[1].state.epoch == whole[1].state.epoch == 1
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("between", ["before the first step", "between experiences"])
def test_a_stop_before_a_step_enters_no_experience_twice(tmp_path, whole, between):
    """`on_experience_start` may draw: called for the stop and again after resuming, it would draw twice."""

    class Stopper(Observer):
        def on_checkpoint(self, state, path):
            if state.step == (0 if between == "before the first step" else 12):
                self.trainer.request_stop()

    stopper = Stopper()
    stopper.trainer = trainer = trainer_of(tmp_path, [stopper])
    assert trainer.run().status == "interrupted"
    assert trainer.state.step in (0, 12)
    assert_same_end(run(tmp_path, resume=True), whole)


def test_a_stop_while_measuring_measures_nothing_twice(tmp_path, whole):
    """Neither does one that a resumed run is given before its first step; strategies may act on every measurement."""

    class Stopper(Observer):
        def on_within(self, state, values):
            if state.step == 5:
                self.trainer.request_stop()

    stopper = Stopper()
    stopper.trainer = trainer = trainer_of(tmp_path, [stopper])
    stopped = trainer.run()
    assert stopped.status == "interrupted"
    assert trainer.state.step == 5
    again = trainer_of(tmp_path)
    again.request_stop()
    assert again.run(resume=True).within == stopped.within
    assert_same_end(run(tmp_path, resume=True), whole)


def test_stopping_again_and_again_changes_nothing(tmp_path, whole):
    run(tmp_path, stop_at=2)
    for stop_at in (9, 14, 20):
        run(tmp_path, resume=True, stop_at=stop_at)
    assert_same_end(run(tmp_path, resume=True), whole)


def test_a_finished_run_is_only_read(tmp_path, whole):
    run(tmp_path)
    assert_same_end(run(tmp_path, resume=True), whole)
    assert run(tmp_path, resume=True)[2] == {}


def test_a_truncated_checkpoint_costs_a_few_steps_only(tmp_path, whole):
    run(tmp_path, stop_at=17)
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:2000])
    with pytest.warns(UserWarning, match=f"{newest.name} cannot be read.*trying the one before it"):
        resumed = run(tmp_path, resume=True)
    assert min(resumed[2]) == 16
    assert_same_end(resumed, whole)


def test_other_settings_are_refused_before_anything_changes(tmp_path):
    run(tmp_path, stop_at=5)
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(UserError, match="belongs to a run with other settings"):
        run(tmp_path, resume=True, fingerprint="two")
    assert (tmp_path / "result.json").read_text() == before


def test_without_a_folder_there_is_nothing_to_resume():
    with pytest.raises(ValueError, match="keeps no checkpoint"):
        run(None, resume=True)


def test_a_full_disk_fails_the_run_and_keeps_the_last_checkpoint(tmp_path, whole, monkeypatch):
    saved, count = torch.save, 0

    def fills_up(content, file):
        nonlocal count
        count += 1
        if count == 4:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(content, file)

    monkeypatch.setattr("cl.checkpoint.torch.save", fills_up)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    result = Result.load(tmp_path / "result.json")
    assert result.status == "failed"
    assert "No space left" in result.error
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert_same_end(run(tmp_path, resume=True), whole)


def test_observers_hear_the_end_where_the_disk_takes_no_result_either(tmp_path, monkeypatch):
    """Otherwise a tracker shows the run as going on for ever."""

    class Hears(Observer):
        statuses = ()

        def on_end(self, result):
            self.statuses = (*self.statuses, result.status)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cl.result.os.replace", full)
    hears = Hears()
    with pytest.raises(OSError, match=r"No space left on device: '.*result\.json'"):
        trainer_of(tmp_path, [hears]).run()
    assert hears.statuses == ("failed",)


def test_checkpoint_files_are_few_and_safe(tmp_path):
    run(tmp_path)
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in files] == ["step-000000036-open.pt", "step-000000036.pt"]
    for file in files:
        torch.load(file, weights_only=True)


class Grows(Strategy):
    """Adds a parameter when the run starts: weights in a checkpoint that a fresh model has no place for."""

    settings = frozenset(Setting)

    def __init__(self):
        self.width, self.calls = 0, []

    def on_run_start(self, state):
        self.width = 3
        self._grow(state)

    def on_resume(self, state):
        self.calls.append(("on_resume", self.width))
        self._grow(state)

    def _grow(self, state):
        state.model.register_parameter("grown", torch.nn.Parameter(torch.zeros(self.width)))

    def on_step_end(self, state, batch, output):
        with torch.no_grad():
            state.model.grown += 1

    def state_dict(self):
        return {"width": self.width}

    def load_state_dict(self, state):
        self.width = state["width"]


def test_a_strategy_puts_its_parameters_in_place_before_weights_are_loaded(tmp_path):
    first = train(Setting.DOMAIN_INCREMENTAL, [Grows()], run_dir=tmp_path, stop_at=49)
    grows = Grows()
    second = train(Setting.DOMAIN_INCREMENTAL, [grows], run_dir=tmp_path, resume=True)
    assert first.result.status == "interrupted"
    assert grows.calls == [("on_resume", 3)]
    assert second.weights["grown"].tolist() == [second.trainer.state.step] * 3
