"""What is looked at before the first step, and what the state then is; everything wrong is said before training."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.setup import Span, prepare
from cl.testing import ToyNet, toy_stream

STREAM = toy_stream(Setting.DOMAIN_INCREMENTAL)


def prepared(strategies=(), stream=STREAM, backbone=ToyNet, **config):
    sgd = partial(torch.optim.SGD, lr=0.1)
    settings = TrainerConfig(**({"device": "cpu"} | config))
    return prepare(stream, backbone, strategies, lambda model: sgd(model.parameters()), settings, seed=0)


def test_a_stream_is_asked_about_the_batch_size():
    def check(size):
        raise UserError(f"not {size} rows")

    with pytest.raises(UserError, match="not 24 rows"):
        prepared(stream=replace(STREAM, check_batch=check), batch_size=24)


def test_an_experience_without_rows_is_refused_before_one_is_trained():
    first, *others, last = STREAM.experiences
    stream = replace(STREAM, experiences=[first, *others, replace(last, num_samples=0)])
    with pytest.raises(UserError, match=rf"experience 2 \('{last.name}'\) has no training rows"):
        prepared(stream=stream)


class Wraps(Strategy):
    """Puts the network in a box, and wants to find its own box and whatever others put around it."""

    def __init__(self, name):
        self.name, self.shown = name, None

    def wrap(self, backbone, info):
        return torch.nn.ModuleDict({self.name: backbone})

    def check_model(self, model, info):
        self.shown = [name for name, _ in model.named_children()], info.name


def test_every_strategy_is_shown_the_network_that_all_have_wrapped():
    first, second = Wraps("first"), Wraps("second")
    state = prepared([first, second])
    assert first.shown == second.shown == (["second"], STREAM.info.name)
    assert list(state.model["second"]) == ["first"]


def test_the_network_is_compiled_when_that_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    plain, fast = prepared().model, prepared(compile=True).model
    assert compiled == [fast] and plain is not fast


class Halved(ToyNet):
    """A backbone whose weights are float16."""

    def __init__(self, info):
        super().__init__(info)
        self.half()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, False), ({"precision": "bf16"}, False), ({"precision": "fp16"}, True), ({"backbone": Halved}, True)],
)
def test_losses_are_scaled_where_gradients_are_float16(options, wanted):
    assert prepared(**options).scaler.is_enabled() is wanted


def test_steps_are_known_before_anything_is_loaded():
    """192 rows in batches of 40, two to a step, three times: 3 steps an epoch."""
    state = prepared(epochs=3, batch_size=40, accumulation=2)
    assert state.experience_steps == [9, 9, 9] and state.total_steps == 27


def test_a_list_of_steps_is_where_the_stream_ends():
    state = prepared(max_steps=[5, 7])
    assert state.experience_steps == [5, 7] and len(state.stream.experiences) == 2
    assert prepared(max_steps=(5, 7)).experience_steps == [5, 7]
    with pytest.raises(UserError, match="lists the steps of 4 experiences, and stream toy_domain_incremental has 3"):
        prepared(max_steps=[1, 2, 3, 4])


# the course of the schedule


@pytest.mark.parametrize("listed", [5, "ab", [10], [10, 10, 10], [10, 0], [10, 2.0], [True, 10]])
def test_a_plan_of_the_schedule_is_as_long_as_the_run(listed):
    with pytest.raises(
        UserError, match=r"trainer\.schedule_steps is .*; it must be a list of 2 integers of at least 1"
    ):
        Span([10, 10], TrainerConfig(schedule_steps=listed))


def test_a_schedule_begins_within_the_run():
    assert Span([10, 30], TrainerConfig(schedule_start=39)).at(1, 29) == (0, 1)
    with pytest.raises(UserError, match=r"trainer\.schedule_start is 40; it must be below the 40 steps"):
        Span([10, 30], TrainerConfig(schedule_start=40))


def test_where_each_step_lies_on_its_course():
    """A run of 10 and 30 steps, as one course or two, from its beginning or from step 15."""
    whole, each = Span([10, 30], TrainerConfig()), Span([10, 30], TrainerConfig(schedule_span="experience"))
    assert [whole.at(0, 9), whole.at(1, 0), whole.at(1, 29)] == [(9, 40), (10, 40), (39, 40)]
    assert [each.at(0, 9), each.at(1, 0), each.at(1, 29)] == [(9, 10), (0, 30), (29, 30)]
    assert (whole.steps, each.steps) == ([10, 30], [10, 30])
    late = Span([10, 30], TrainerConfig(schedule_start=15))
    assert late.steps == [25] and [late.at(0, 9), late.at(1, 4), late.at(1, 29)] == [(0, 25), (0, 25), (24, 25)]
    apart = Span([10, 30], TrainerConfig(schedule_start=15, schedule_span="experience"))
    assert [apart.at(1, 5), apart.at(1, 29)] == [(0, 25), (24, 25)]
    longer = Span([20, 20, 20], TrainerConfig(schedule_steps=[10, 10, 10]))
    assert [longer.at(k, step) for k in (0, 1, 2) for step in (9, 19)] == [(n, 30) for n in (9, 9, 19, 19, 29, 39)]
