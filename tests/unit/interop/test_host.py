"""Every strategy of Avalanche that the catalog says works: it trains, is measured, stops and goes on exactly."""

import inspect
from functools import partial

import pytest
import torch

pytest.importorskip("avalanche")
from cl.backbones.mlp import Mlp
from cl.backbones.resnet18 import Resnet18
from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.interop._host import HostingTrainer
from cl.interop.avalanche import Own, strategy_class
from cl.interop.catalog import METHODS
from cl.observe import Observer
from cl.testing import toy_stream

WORKING = [name for name, method in METHODS.items() if not method.broken]
BROKEN = [name for name, method in METHODS.items() if method.broken]
SMALL = partial(Mlp, hidden=[24])
RECIPE = {"epochs": 2, "batch_size": 20, "device": "cpu"}


class Stop(Observer):
    """Asks the run to stop after a step; counts what it was told."""

    def __init__(self, at=None):
        self.at, self.steps, self.trainer = at, 0, None

    def on_step(self, state, losses, lr):
        self.steps += 1
        if state.step == self.at:
            self.trainer.request_stop()


def trainer_of(strategy, setting, run_dir=None, stop_at=None, backbone=SMALL, **config):
    stop = Stop(stop_at)
    trainer = HostingTrainer(
        toy_stream(Setting(setting)),
        backbone,
        [strategy],
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.5),
        config=TrainerConfig(**(RECIPE | config)),
        run_dir=run_dir,
        observers=[stop],
    )
    stop.trainer = trainer
    trainer.watch = stop
    return trainer


QUICK = (
    *("AGEM", "DER", "EWC", "FeatureReplay", "GEM", "ICaRL", "JointTraining", "LwF", "Naive"),
    *("PNNStrategy", "PackNet", "Replay", "StreamingLDA"),
)
"""One for each thing that a template may do to models, loaders, plugins and memories; the others are marked slow."""
CASES = [(name, setting) for name in WORKING for setting in METHODS[name].settings]
FIRST = [(name, METHODS[name].settings[-1]) for name in QUICK]
OTHERS = [case for case in CASES if case not in FIRST]


def runs_and_resumes(name, setting, folder):
    def new(folder, **options):
        return trainer_of(strategy_class(name)(), setting, folder, **options)

    whole = new(folder / "whole")
    result = whole.run()
    num = 1 if METHODS[name].recipe == "joint" else 3
    assert result.status == "done" and len(result.R) == num
    learned = [row[j] for row, j in zip(result.R, result.trained, strict=True)] if num > 1 else result.R[0]
    assert all(0 <= value <= 1 for value in learned)
    assert result.cost["updates"] == whole.watch.steps > 0
    assert result.cost["forwards"] > 0 or METHODS[name].recipe == "pnn"

    first = new(folder / "halves", stop_at=max(1, int(whole.state.step * 0.7)))
    assert first.run().status == "interrupted"
    torch.rand(7)
    second = new(folder / "halves")
    assert second.run(resume=True).R == result.R, "it goes on as if it had not been stopped"
    left, right = (t.host.template.model.state_dict() for t in (whole, second))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(("name", "setting"), FIRST)
def test_runs_and_resumes(name, setting, tmp_path):
    runs_and_resumes(name, setting, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), OTHERS)
def test_every_other_one_runs_and_resumes(name, setting, tmp_path):
    runs_and_resumes(name, setting, tmp_path)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_ones_say_why(name):
    with pytest.raises(UserError, match=f"avalanche/{name} does not run: it "):
        strategy_class(name)


def test_the_catalog_names_every_strategy_class():
    import avalanche.training.supervised as supervised

    shipped = {
        name
        for name, thing in vars(supervised).items()
        if getattr(thing, "__module__", "").startswith(supervised.__name__)
    }
    shipped = {name for name in shipped if name[0].isupper() and name != "LaMAML"}
    assert shipped <= set(METHODS), f"not in the catalog: {sorted(shipped - set(METHODS))}"
    assert not [name for name in METHODS if name in vars(supervised) and name not in shipped]


def test_signature_is_theirs():
    assert list(inspect.signature(strategy_class("EWC")).parameters) == [
        "ewc_lambda",
        "mode",
        "decay_factor",
        "keep_importance_data",
    ]
    with pytest.raises(UserError, match=r"no option 'strength'; it takes ewc_lambda=1.0, mode='separate'"):
        strategy_class("EWC")(strength=1)


def test_a_value_they_refuse_is_a_sentence():
    with pytest.raises(UserError, match="avalanche/EWC cannot be made: Mode must be"):
        trainer_of(strategy_class("EWC")(mode="sideways"), "class_incremental")


@pytest.mark.parametrize(("mem_size", "is_enough"), [(24, True), (23, False)])
def test_a_memory_with_less_than_a_batch_of_a_class_is_no_endless_loop(mem_size, is_enough):
    """Six classes at the end, batches of 4 rows."""
    trainer = trainer_of(strategy_class("ER_AML")(mem_size=mem_size), "class_incremental", batch_size=4)
    if is_enough:
        assert trainer.run().status == "done"
        return
    with pytest.raises(UserError, match="draws batches of 4 rows of one class, and its memory holds 3 of some"):
        trainer.run()


def test_a_setting_where_it_makes_no_sense():
    with pytest.raises(UserError, match="class_incremental"):
        trainer_of(strategy_class("PNNStrategy")(), "class_incremental")


@pytest.mark.parametrize(
    "config", [{"accumulation": 2}, {"precision": "bf16"}, {"checkpoint_every": 5}, {"logit_mask": "batch"}], ids=str
)
def test_what_their_loop_cannot_do(config):
    with pytest.raises(UserError, match=f"trainer.{next(iter(config))} is .*the loop is theirs"):
        trainer_of(strategy_class("Naive")(), "class_incremental", **config)


def test_it_trains_alone():
    from strategies.replay import Replay

    with pytest.raises(UserError, match="alone"):
        HostingTrainer(
            toy_stream(Setting.CLASS_INCREMENTAL), Mlp, [strategy_class("Naive")(), Replay()], optimizer=torch.optim.SGD
        )


def test_budget_in_steps_schedule_clipping_and_measuring_inside():
    from cl.schedules import linear

    trainer = trainer_of(strategy_class("Replay")(), "domain_incremental", epochs=None, max_steps=25, eval_every=10)
    trainer.schedule = linear
    result = trainer.run()
    assert result.cost["updates"] == 75 and trainer.state.optimizer.param_groups[0]["lr"] < 0.05 / 70
    assert [step for _, step, j, _ in result.within if j == 0] == [10, 20, 35, 45, 60, 70]
    still = trainer_of(strategy_class("Naive")(), "domain_incremental", clip_norm=1e-12)
    before = [p.clone() for p in still.state.model.parameters()]
    still.run()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, still.state.model.parameters(), strict=True))


def test_a_template_of_the_users():
    from avalanche.training.templates import SupervisedTemplate

    class Mine(SupervisedTemplate):
        def __init__(self, strength=1.0, **kwargs):
            super().__init__(**kwargs)
            self.strength = strength

    strategy = Own("avalanche.training.templates.SupervisedTemplate")
    strategy.kind, strategy.options = Mine, {"strength": 3.0}
    trainer = trainer_of(strategy, "class_incremental")
    assert trainer.run().status == "done" and trainer.host.template.strength == 3.0


def test_batch_statistics_and_convolutions(tmp_path):
    trainer = trainer_of(
        strategy_class("Replay")(),
        "class_incremental",
        tmp_path,
        backbone=partial(Resnet18, width=4),
        epochs=None,
        max_steps=2,
    )
    assert trainer.run().status == "done"


def test_backbones_that_cannot_be_split_are_named():
    with pytest.raises(UserError, match="avalanche/ICaRL needs a backbone with one linear head"):
        trainer_of(strategy_class("ICaRL")(), "class_incremental", backbone=lambda info: Headless(info))


class Headless(torch.nn.Module):
    def __init__(self, info):
        super().__init__()
        self.layer = torch.nn.Linear(64, info.num_outputs)

    def forward(self, batch):
        from cl.core import Output

        return Output(self.layer(batch.inputs.flatten(1)))


def test_no_warning_of_theirs_is_shown(recwarn):
    trainer_of(strategy_class("Replay")(), "class_incremental", epochs=1).run()
    loud = [str(w.message)[:80] for w in recwarn.list if "avalanche" in w.filename]
    assert not loud


def test_global_generators_are_as_found():
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer_of(strategy_class("AGEM")(), "class_incremental", epochs=1).run()
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())
