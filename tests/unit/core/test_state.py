"""What hooks read of the running experience: there while one runs, one clear sentence where there is none."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Batch, Output, Part, Setting
from cl.hooks import Strategy
from cl.observe import Observer
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer

HOOKS = (
    "on_run_start",
    "on_experience_start",
    "on_batch",
    "penalty",
    "on_gradients",
    "step",
    "on_step_end",
    "on_experience_end",
    "on_evaluation",
    "eval_forward",
)


class Watching(Strategy):
    """Notes at every hook whether an experience has begun, and which one and how many rows it reads."""

    def __init__(self):
        self.read = []


def _watched(hook):
    def watch(self, state, *others):
        begun = state.has_begun
        self.read.append((hook, begun, (state.experience.id, len(state.data)) if begun else None))
        return getattr(Strategy, hook)(self, state, *others)

    return watch


for _hook in HOOKS:
    setattr(Watching, _hook, _watched(_hook))


def made(strategies=(), stream=None, observers=(), **config):
    settings = {"batch_size": 64, "device": "cpu", "max_steps": 1} | config
    return Trainer(
        stream or toy_stream(Setting.DOMAIN_INCREMENTAL),
        ToyNet,
        strategies,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(**settings),
        observers=observers,
    )


def test_before_an_experience_one_sentence_says_so():
    state = made().state
    assert not state.has_begun
    with pytest.raises(RuntimeError, match=r"^no experience has begun.*has_begun"):
        _ = state.experience
    with pytest.raises(RuntimeError, match=r"^no rows are loaded.*has_begun"):
        _ = state.data
    assert state.progress == 0.0


def test_every_hook_of_training_reads_the_running_experience():
    watching = Watching()
    trainer = made([watching], evaluate="all")
    trainer.run()
    experiences = trainer.state.stream.experiences
    before = [hook for hook, begun, _ in watching.read if not begun]
    # the untrained model is measured too, and nobody is told of that
    assert before[0] == "on_run_start" and set(before[1:]) == {"eval_forward"}
    inside = [each for each in watching.read if each[1]]
    assert {hook for hook, _, _ in inside} == set(HOOKS) - {"on_run_start"}
    course = [read for hook, _, read in inside if hook == "on_experience_end"]
    assert course == [(each.id, each.num_samples) for each in experiences]
    assert [read for _, _, read in inside] == sorted(read for _, _, read in inside)


def test_rows_are_let_go_before_the_next_ones_are_read():
    stream, loaded, seen = toy_stream(Setting.DOMAIN_INCREMENTAL), [], []

    class Rows:
        """One object for each load, which the stream's own data, kept alive by it, may not be."""

        def __init__(self, data):
            self.data, self.rows = data, data.rows

        def __len__(self):
            return len(self.data)

    def load(experience):
        seen.append((trainer.state.has_begun, [rows() for rows in loaded]))
        found = Rows(experience.load())
        loaded.append(weakref.ref(found))
        return found

    watched = replace(stream, experiences=[replace(each, load=partial(load, each)) for each in stream.experiences])
    trainer = made(stream=watched)
    trainer.run()
    assert seen == [(False, [None] * k) for k in range(len(stream.experiences))]
    assert trainer.state.has_begun and trainer.state.data is loaded[-1](), "what ended last stays readable"


def test_assigning_and_copying_work_as_with_plain_attributes():
    state = made().state
    experience = state.stream.experiences[1]
    state.experience, state.data = experience, experience.load()
    assert state.experience is experience and state.has_begun
    other = replace(state, model=torch.nn.Identity())
    assert other.experience is experience and other.data is state.data
    other.leave()
    assert not other.has_begun and state.has_begun


def test_a_failure_in_the_middle_of_reading_is_told_as_itself():
    """Costs are asked for after it, of strategies that look at the running experience."""

    def broken():
        raise KeyboardInterrupt

    class Costly(Strategy):
        def cost(self, state, batch_size):
            return replace(super().cost(state, batch_size), buffer_bytes=len(state.data) if state.has_begun else 0)

    stream = toy_stream(Setting.DOMAIN_INCREMENTAL)
    first, second, *_ = stream.experiences
    trainer = made([Costly()], stream=replace(stream, experiences=[first, replace(second, load=broken)]))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_observers_and_progress_know_where_the_run_stands():
    class Places(Observer):
        def __init__(self):
            self.places = []

        def on_step(self, state, losses, lr):
            self.places.append((state.experience.id, state.progress))

    places = Places()
    made(observers=[places], max_steps=2).run()
    # told of a step before it is counted
    assert places.places[:4] == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]


def test_what_rows_and_answers_say_where_a_column_is_left_out():
    rows = Batch(torch.zeros(2, 3), torch.tensor([1, 0]), torch.zeros(2), torch.arange(2))
    assert rows.heads.tolist() == [0, 0] and rows.stored is rows.inputs
    told = replace(rows, task_id=torch.tensor([4, 5]), raw=torch.ones(2, 7), parts=(Part(0, 2),))
    assert told.heads.tolist() == [4, 5] and told.stored is told.raw
    hidden = torch.ones(2, 4)
    assert Output(torch.zeros(2, 2), hidden).features is hidden
    with pytest.raises(ValueError, match=r"Output\.hidden"):
        _ = Output(torch.zeros(2, 2)).features
