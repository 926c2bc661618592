"""iCaRL against targets, herding and nearest means that are written out again, row by row."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cl.core import Batch, Output, Setting, UserError
from cl.evaluation import evaluating, predict
from cl.state import TrainState
from cl.testing import ToyNet, toy_stream, train
from cl.trainer import Trainer
from strategies.icarl import Icarl, herded
from strategies.replay import Replay

CLASS = Setting.CLASS_INCREMENTAL


def plain_bce(model, teacher, rows, current, seen):
    """Mean over rows and classes seen of -t log s - (1 - t) log(1 - s)."""
    said, total = model(rows).logits.sigmoid(), 0.0
    old = teacher(rows).logits.sigmoid().detach() if teacher is not None else None
    for i in range(len(rows)):
        for c in seen:
            target = float(rows.targets[i] == c) if c in current else float(old[i, c])
            total = total - target * said[i, c].log() - (1 - target) * (1 - said[i, c]).log()
    return total / (len(rows) * len(seen))


def check(lab, icarl, others=(), stream=CLASS):
    """Loss and gradient of every step."""
    recorder, _ = lab.run([icarl, *others], stream)
    model = deepcopy(recorder.start)
    for step in recorder.steps:
        model.load_state_dict(step.before)
        k = step.experience
        teacher = recorder.ends[k - 1] if k else None
        mine = [step.batch[part.rows] for part in step.batch.parts if part.owner in ("stream", "icarl")]
        loss = plain_bce(model, teacher, Batch.cat(mine), range(2 * k, 2 * k + 2), range(2 * k + 2))
        lab.close(step.terms["icarl"], loss.detach(), rtol=1e-5)
        for part in step.batch.parts:
            if part.owner == "replay":
                rows = step.batch[part.rows]
                loss = loss + lab.label_loss(model, rows)
        lab.close(step.gradients, lab.gradient(model, loss), rtol=1e-4, atol=1e-8)
    return recorder


def test_loss_is_bce_on_labels_and_old_outputs(lab):
    recorder = check(lab, Icarl(capacity=30, replay_batch_size=8))
    sizes = [[len(part) for part in step.batch.parts] for step in recorder.steps]
    assert sizes == [[16]] * 12 + [[16, 8]] * 24


def test_rows_of_others_keep_their_own_loss(lab):
    check(lab, Icarl(capacity=30, replay_batch_size=8), [Replay(capacity=20, replay_batch_size=4)])


def test_the_oracle_needs_the_old_outputs(lab, monkeypatch):
    def labels_only(self, state, rows, like):
        return torch.nn.functional.one_hot(rows.targets, like.shape[1]).to(like.dtype)

    monkeypatch.setattr(Icarl, "_targets", labels_only)
    lab.dies(lambda: check(lab, Icarl(capacity=30, replay_batch_size=8)))


def test_the_label_loss_is_replaced(lab):
    recorder, _ = lab.run([Icarl(capacity=30)], CLASS)
    assert all(step.terms["cross_entropy"] == 0 for step in recorder.steps)


def test_default_share_is_that_of_the_union(lab):
    """30 exemplars beside 192 rows: 16 * 30 / 192 = 2.5, rounded up."""
    recorder, _ = lab.run([Icarl(capacity=30)], CLASS)
    assert [len(part) for part in recorder.steps[-1].batch.parts] == [16, 3]


# herding


def plain_herding(features, size):
    """The definition, by trying every row."""
    chosen, mean = [], features.mean(0)
    while len(chosen) < min(size, len(features)):
        free = [i for i in range(len(features)) if i not in chosen]
        chosen.append(min(free, key=lambda i: float((mean - features[[*chosen, i]].mean(0)).norm())))
    return chosen


@pytest.mark.parametrize(("num_rows", "size"), [(40, 12), (5, 5), (5, 9), (1, 1)])
def test_herding_is_the_definition(num_rows, size):
    generator = torch.Generator().manual_seed(num_rows)
    features = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64)
    assert herded(features, size).tolist() == plain_herding(features, size)


def test_herded_mean_is_nearer_than_a_random_one():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 8, generator=generator)
    mean = features.mean(0)
    random = torch.stack([features[torch.randperm(500, generator=generator)[:20]].mean(0) for _ in range(50)])
    nearest = (random - mean).norm(dim=1).min()
    assert (features[herded(features, 20)].mean(0) - mean).norm() < 0.3 * nearest


def check_exemplars(lab, capacity=25):
    """Rows of every class in herding order, under the model at the end of its own experience."""
    icarl = Icarl(capacity=capacity)
    recorder, trainer = lab.run([icarl], CLASS)
    share = capacity // 6
    for c in range(6):
        k = c // 2
        data = trainer.state.stream.experiences[k].load()
        rows = trainer.state.prepare(data.rows((data.targets == c).nonzero().squeeze(1)))
        model = recorder.ends[k].eval()
        features = nn.functional.normalize(model(rows).hidden.detach(), dim=1)
        # as many as the class got at first, of which the first ones are still there
        wanted = plain_herding(features, capacity // (2 * (k + 1)))[:share]
        assert icarl.exemplars[c]["sample_ids"].tolist() == rows.sample_ids[wanted].tolist()
        assert set(icarl.exemplars[c]["targets"].tolist()) == {c}
    assert sum(len(columns["targets"]) for columns in icarl.exemplars.values()) == 6 * share <= capacity
    return icarl


def test_exemplars_are_herded_and_shrink_from_the_end(lab):
    check_exemplars(lab)


def test_the_oracle_needs_herding(lab, monkeypatch):
    monkeypatch.setattr("strategies.icarl.herded", lambda features, size: torch.arange(len(features))[:size])
    lab.dies(lambda: check_exemplars(lab))


# the classifier


def test_prediction_is_the_nearest_mean_of_exemplars(lab):
    icarl = Icarl(capacity=30)
    recorder, trainer = lab.run([icarl], CLASS)
    state, model = trainer.state, recorder.ends[-1].eval()
    means = []
    for c in range(6):
        rows = state.prepare(Batch(**icarl.exemplars[c]))
        mean = nn.functional.normalize(model(rows).hidden, dim=1).mean(0)
        means.append(mean / mean.norm())
    correct = num = 0
    for j, eval_set in enumerate(state.stream.eval_sets):
        data = eval_set.load()
        rows = state.prepare(data.rows(torch.arange(len(data))))
        with evaluating(state.model):
            said = predict(state, [icarl], rows).logits.argmax(1)
        features = nn.functional.normalize(model(rows).hidden, dim=1)
        nearest = [min(range(6), key=lambda c, f=f: (f - means[c]).norm().item()) for f in features]
        assert said.tolist() == nearest
        correct, num = (said == rows.targets).float().mean(), j
        lab.close(trainer.ledger.result.R[-1][j], correct)
    assert num == 2


def test_before_there_are_exemplars_the_outputs_decide(lab):
    run = train(CLASS, [Icarl(capacity=30)], epochs=1)
    naive = train(CLASS, [], epochs=1)
    assert run.result.R_init == naive.result.R_init, "chance level of the untrained outputs"
    state = run.trainer.state
    icarl, state.classes_seen = run.trainer.strategies[1], (*state.classes_seen, 99)
    assert icarl.eval_forward(state, state.prepare(state.data.rows(torch.arange(3)))) is None


def test_classes_without_exemplars_are_never_predicted(lab):
    """After the first of three experiences only its two classes have exemplars."""
    icarl = Icarl(capacity=30)
    first = replace(lab.stream_of(CLASS).first(1), eval_sets=toy_stream(CLASS).eval_sets)
    _, trainer = lab.run([icarl], first)
    data = toy_stream(CLASS).eval_sets[2].load()
    with evaluating(trainer.state.model):
        logits = icarl.eval_forward(trainer.state, trainer.state.prepare(data.rows(torch.arange(96)))).logits
    assert set(logits.argmax(1).tolist()) <= {0, 1}
    assert logits[:, :2].isfinite().all() and (logits[:, 2:] == -torch.inf).all()


def test_a_class_that_comes_back_is_new_again():
    stream = toy_stream(CLASS, num_experiences=2)
    again = replace(stream.experiences[0], id=2, name="again")
    info = replace(stream.info, num_experiences=3)
    icarl = Icarl(capacity=40)
    run = train(replace(stream, info=info, experiences=[*stream.experiences, again]), [icarl])
    assert run.result.status == "done"
    assert {c: len(columns["targets"]) for c, columns in icarl.exemplars.items()} == dict.fromkeys(range(4), 10)
    assert run.result.R[2][0] > 0.6


# bad input


class Featureless(ToyNet):
    def forward(self, batch):
        return Output(super().forward(batch).logits)


def test_a_backbone_must_return_features():
    """Refused before there is a run."""
    with pytest.raises(UserError, match=r"the backbone Featureless returns none \(`Output.hidden`\)"):
        Trainer(toy_stream(CLASS), Featureless, [Icarl(capacity=30)], optimizer=partial(torch.optim.SGD, lr=0.1))


def test_streams_and_capacities_that_do_not_fit():
    with pytest.raises(UserError, match=r"icarl.capacity is 5; it must be at least 6, one exemplar for each class"):
        train(CLASS, [Icarl(capacity=5)])
    stream = toy_stream(CLASS)
    silent = replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences])
    with pytest.raises(UserError, match=r"experience 0 \('toy 0'\) of stream toy_class_incremental does not say which"):
        train(silent, [Icarl()])
    for arguments, name in (({"capacity": 0}, "capacity"), ({"replay_batch_size": 0}, "replay_batch_size")):
        with pytest.raises(UserError, match=f"icarl.{name} is 0; it must be an integer of at least 1"):
            Icarl(**arguments)


def test_exemplars_are_not_counted_at_evaluation(monkeypatch):
    """Rows in the books are training work: evaluation twice as often costs nothing."""
    spent = [train(CLASS, [Icarl(capacity=30)], eval_every=every).trainer.state.spent for every in (0, 5)]
    assert spent[0] == spent[1]
    assert isinstance(spent[0], type(TrainState.__dataclass_fields__["spent"].default_factory()))
