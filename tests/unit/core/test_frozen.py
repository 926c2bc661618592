"""Frozen pretrained weights: checkpoints leave out what the run was given and has not changed, and nothing else."""

import hashlib
import math
from functools import partial

import pytest
import torch
from torch import nn

from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.frozen import Given, frozen_weights, require_unchanged
from cl.hooks import Strategy
from cl.testing import ToyNet, equal, toy_stream
from cl.trainer import Trainer

GIVEN = {"first.weight", "first.bias"}


class Pretrained(ToyNet):
    """Its first layer is read from a file and frozen; a second frozen one is drawn."""

    def __init__(self, info, file):
        super().__init__(info)
        self.first.load_state_dict(torch.load(file, weights_only=True))
        self.drawn = nn.Linear(12, 12).requires_grad_(False)
        self.first.requires_grad_(False)
        self.given = Given(str(file), frozenset(GIVEN))

    def features(self, inputs):
        return self.drawn(super().features(inputs)).relu()


class Merge(Strategy):
    """Adds something to a frozen weight when the first experience ends, past everything that watches gradients."""

    settings = frozenset(Setting)

    def __init__(self):
        self.name = "merge"

    def on_experience_end(self, state):
        if state.experience.id == 0:
            state.model.first.weight.data[0, 0] += 0.5


class Stop(Strategy):
    settings = frozenset(Setting)

    def __init__(self, at):
        self.name, self.at = "stop", at

    def on_step_end(self, state, batch, output):
        if state.step == self.at:
            self.trainer.request_stop()


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "weights.pt")


def written(path, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.save(nn.Linear(64, 12).state_dict(), path)
    return path


def trainer_of(file, run_dir, strategies=(), backbone=Pretrained, stop_at=None):
    stop = Stop(stop_at)
    stop.trainer = Trainer(
        toy_stream(Setting.DOMAIN_INCREMENTAL),
        partial(backbone, file=file),
        [*strategies, stop],
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        config=TrainerConfig(max_steps=4, batch_size=16, checkpoint_every=2, device="cpu"),
        run_dir=run_dir,
    )
    return stop.trainer


def saved(run_dir):
    return max(run_dir.glob("checkpoints/*.pt"))


def state_in(run_dir):
    return torch.load(saved(run_dir), weights_only=True)["state"]


def test_a_checkpoint_holds_what_is_trained_or_drawn_and_names_the_rest(tmp_path, file):
    trainer = trainer_of(file, tmp_path / "run")
    trainer.run()
    state, everything = state_in(tmp_path / "run"), trainer.state.model.state_dict()
    assert state["frozen"].keys() == GIVEN
    assert state["model"].keys() == everything.keys() - GIVEN
    assert any(name.startswith("drawn.") for name in state["model"]), "a seed is no folder"


@pytest.mark.parametrize("strategies", [[], [Merge]], ids=["frozen", "merged"])
@pytest.mark.parametrize("stop_at", [3, 6])
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, file, strategies, stop_at):
    whole = trainer_of(file, tmp_path / "whole", [kind() for kind in strategies])
    R = whole.run().R
    trainer_of(file, tmp_path / "run", [kind() for kind in strategies], stop_at=stop_at).run()
    resumed = trainer_of(file, tmp_path / "run", [kind() for kind in strategies])
    assert resumed.run(resume=True).R == R
    assert equal(resumed.state.model.state_dict(), whole.state.model.state_dict())
    assert equal(state_in(tmp_path / "run")["model"], state_in(tmp_path / "whole")["model"])


def test_a_frozen_weight_that_was_changed_is_held_from_then_on(tmp_path, file):
    trainer_of(file, tmp_path / "run", [Merge()], stop_at=3).run()
    assert state_in(tmp_path / "run")["frozen"].keys() == GIVEN
    trainer_of(file, tmp_path / "run", [Merge()]).run(resume=True)
    state = state_in(tmp_path / "run")
    assert state["frozen"].keys() == {"first.bias"}
    change = state["model"]["first.weight"] - torch.load(file, weights_only=True)["weight"]
    assert change[0, 0] == pytest.approx(0.5) and change.count_nonzero() == 1


@pytest.mark.parametrize("strategies", [[], [Merge]], ids=["frozen", "merged"])
def test_another_pretrained_model_is_refused_where_the_checkpoint_has_not_its_weights(tmp_path, file, strategies):
    stopped = trainer_of(file, tmp_path / "run", [kind() for kind in strategies], stop_at=6)
    stopped.run()
    before = saved(tmp_path / "run").read_bytes()
    written(file, seed=1)
    with pytest.raises(UserError) as error:
        trainer_of(file, tmp_path / "run", [kind() for kind in strategies]).run(resume=True)
    others = "first.bias differ" if strategies else "first.bias and 1 more differ"
    assert str(file) in str(error.value) and others in str(error.value)
    assert saved(tmp_path / "run").read_bytes() == before


def test_a_checkpoint_of_before_holds_everything_and_goes_on(tmp_path, file):
    """Even where the model has changed since: its numbers are in the checkpoint, and stay there."""
    whole = trainer_of(file, tmp_path / "whole")
    R = whole.run().R
    stopped = trainer_of(file, tmp_path / "run", stop_at=6)
    stopped.run()
    payload = torch.load(saved(tmp_path / "run"), weights_only=True)
    payload["state"]["model"] |= {name: stopped.state.model.state_dict()[name] for name in payload["state"]["frozen"]}
    del payload["state"]["frozen"]
    torch.save(payload, saved(tmp_path / "run"))
    written(file, seed=1)
    resumed = trainer_of(file, tmp_path / "run")
    assert resumed.run(resume=True).R == R
    assert equal(resumed.state.model.state_dict(), whole.state.model.state_dict())
    assert state_in(tmp_path / "run")["frozen"] == {}


class Trained(Pretrained):
    """Given, and trained all the same."""

    def __init__(self, info, file):
        super().__init__(info, file)
        self.first.requires_grad_(True)


def test_what_is_trained_is_held(tmp_path, file):
    trainer = trainer_of(file, tmp_path / "run", backbone=Trained)
    trainer.run()
    assert equal(state_in(tmp_path / "run")["model"], dict(trainer.state.model.state_dict()))


class One(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.given = Given("here", frozenset({"weight"}))


def test_hashes_are_those_of_the_bytes_and_their_form():
    weight = torch.arange(6, dtype=torch.float64).view(2, 3)
    expected = hashlib.sha256(b"torch.float64 (2, 3)" + weight.numpy().tobytes()).hexdigest()[:32]
    assert frozen_weights(nn.Sequential(One(weight))) == {"0.weight": expected}
    assert frozen_weights(One(weight.T.contiguous().T)) == {"weight": expected}, "wherever the bytes lie"


@pytest.mark.parametrize(
    "other",
    [torch.tensor([-0.0, math.nan]), torch.tensor([[0.0, math.nan]]), torch.tensor([0, 0x7FC00000]).int().half()],
    ids=["sign of zero", "shape", "form"],
)
def test_one_bit_is_enough(other):
    frozen = frozen_weights(One(torch.tensor([0.0, math.nan])))
    require_unchanged(One(torch.tensor([0.0, math.nan])), frozen)
    with pytest.raises(UserError, match=r"the pretrained model \(here\) .*: weight differ; put the old files back"):
        require_unchanged(One(other), frozen)
