"""TRACE's replay: an epoch after each experience, against a plain loop."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.config import TrainerConfig
from cl.core import Batch, Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies.trace_replay import TraceReplay

TEXT = Setting.CONTINUAL_PRETRAINING
ROWS, KEPT = 192, 48


class Before(Strategy):
    """The model as it was before the strategies behind it acted at the end of an experience."""

    settings = frozenset(Setting)

    def __init__(self):
        self.models, self.passes = [], []

    def on_experience_start(self, state):
        vars(state).pop("forward", None)

    def on_experience_end(self, state):
        self.models.append(deepcopy(state.model))
        seen = []
        whole, self.passes = state.forward, [*self.passes, seen]
        state.forward = lambda batch, model=None: seen.append(batch) or whole(batch, model)


def trained(lab, **options):
    before, recorder = Before(), lab.Recorder()
    strategy = TraceReplay(**({"rate": 25.0} | options))
    trainer = Trainer(
        toy_stream(TEXT),
        lambda info: ToyNet(info).double(),
        [before, strategy, recorder],
        optimizer=partial(torch.optim.SGD, lr=lab.lr),
        schedule=lambda step, total: 1 - step / total,
        config=TrainerConfig(epochs=1, batch_size=lab.batch_size, device="cpu"),
    )
    trainer.run()
    return before, recorder, trainer


@pytest.mark.parametrize("general", [False, True])
def test_a_pass_follows_every_experience(lab, general):
    before, recorder, trainer = trained(lab, general=general)
    stream = trainer.state.stream
    extra = len(stream.general()) if general else 0
    assert [sum(map(len, seen)) for seen in before.passes] == [extra, KEPT + extra, 2 * KEPT + extra]
    for number, (model, seen) in enumerate(zip(before.models, before.passes, strict=True)):
        origins = Batch.cat(seen).experience_id.bincount().tolist() if seen else []
        assert origins == [KEPT] * number + ([0] * (3 - number) + [extra] if general else [])
        for batch in seen:
            # at the base rate, whatever the schedule has come to
            loss = F.cross_entropy(model(batch).logits.flatten(0, 1), batch.targets.flatten())
            gradients = lab.gradient(model, loss)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= lab.lr * gradients[name]
        lab.close(lab.weights(recorder.ends[number]), lab.weights(model), 1e-5, 1e-6)


def test_rows_are_kept_once_and_are_those_of_the_stream(lab):
    before, _, trainer = trained(lab, general=False)
    second, third = (Batch.cat(seen) for seen in before.passes[1:])
    of_first = [set(lab.rows_of(rows)) & {(0, n) for n in range(ROWS)} for rows in (second, third)]
    assert of_first[0] == of_first[1] and len(of_first[0]) == KEPT
    rows = trainer.strategies[1]._rows()
    for row in range(0, len(rows), 7):
        source = trainer.state.stream.experiences[int(rows.experience_id[row])].load()
        assert torch.equal(source.rows(rows.sample_ids[row : row + 1]).inputs[0], rows.inputs[row])


@pytest.mark.parametrize(("rate", "count"), [(0.2, 0), (0.3, 1), (50.0, 96), (100.0, ROWS)])
def test_the_rate_is_a_percentage(lab, rate, count):
    _, _, trainer = trained(lab, general=False, rate=rate)
    kept = trainer.strategies[1].kept
    assert (kept["experience_id"].bincount().tolist() if kept else [0] * 3) == [count] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rate": 101}, "trace_replay.rate is 101"), ({"general": "lima"}, "trace_replay.general is 'lima'")],
)
def test_bad_values_are_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        TraceReplay(**options)
