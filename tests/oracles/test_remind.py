"""REMIND against a plain loop over frozen features, nearest centres found one distance at a time, and scikit-learn."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

from cl.backbones import Stage
from cl.core import Batch, Setting, UserError
from cl.testing import ToyNet, toy_stream
from strategies import remind
from strategies._map_augment import beta, resized_crops
from strategies._product_quantiser import MapQuantiser, ProductQuantiser
from strategies.fpf import Fpf
from strategies.kfpf import Kfpf
from strategies.remind import LargestClass, Remind
from strategies.trace_replay import TraceReplay

CLASS = Setting.CLASS_INCREMENTAL
SIZE = 12


class Deep(ToyNet):
    """Two stages, the first one with batch norm."""

    def __init__(self, info):
        super().__init__(info)
        self.norm, self.second = nn.BatchNorm1d(12), nn.Linear(12, 12)

    def stages(self):
        return [Stage(self._first, (self.first, self.norm)), Stage(self._second, (self.second,))]

    def features(self, inputs):
        return self._second(self._first(inputs))

    def _first(self, inputs):
        return self.norm(self.first(inputs.flatten(1))).relu()

    def _second(self, hidden):
        return self.second(hidden).relu()


def decoded(books, outputs):
    """The nearest centre of every piece, by distances."""
    rows, start = [], 0
    for book in books:
        piece = outputs[:, start : start + book.shape[1]]
        rows.append(book[torch.cdist(piece, book).argmin(1)])
        start += book.shape[1]
    return torch.cat(rows, 1)


def check(lab, monkeypatch, mixup=0.0, **options):
    """Every step after the first experience, from the identity of the rows that were drawn."""
    drawn = []
    stored = Remind._stored

    def noted(self, *given):
        rows = stored(self, *given)
        drawn.append((len(recorder_of.steps), rows))
        return rows

    monkeypatch.setattr(Remind, "_stored", noted)
    # the recorder is made inside of `run`, so it is found by its own hook
    recorder_of = type("Steps", (), {"steps": []})
    penalty = lab.Recorder.penalty

    def counted(self, *arguments):
        recorder_of.steps = self.steps
        return penalty(self, *arguments)

    monkeypatch.setattr(lab.Recorder, "penalty", counted)
    shares = []
    monkeypatch.setattr(remind, "beta", lambda *a: shares.append(beta(*a)) or shares[-1])
    strategy = Remind(capacity=150, replay_batch_size=SIZE, num_codebooks=5, codebook_size=16, mixup=mixup)
    recorder, trainer = lab.run([strategy], CLASS, backbone=Deep, **options)
    books = [book.double() for book in strategy.maps.quantiser.codebooks]
    every = [
        trainer.state.prepare(e.load().rows(torch.arange(e.num_samples))) for e in trainer.state.stream.experiences
    ]
    early = deepcopy(recorder.ends[0]).eval()
    early.between = {}
    model = deepcopy(recorder.ends[0])
    model.between = {}
    seen = set(lab.rows_of(every[0]))
    queue, num_checked = iter(drawn), 0
    for number, step in enumerate(recorder.steps):
        if step.experience == 0:
            continue

        def late(inputs):
            with torch.no_grad():
                early_outputs = early._first(inputs)
            return model.head(model._second(decoded(books, early_outputs)))

        at, rows = next(queue)
        assert at == number and len(rows) == SIZE
        assert seen.issuperset(lab.rows_of(rows)), "replayed before it was stored"
        old = torch.stack([every[e].inputs[i] for e, i in lab.rows_of(rows)])
        lab.close(rows.targets, torch.stack([every[e].targets[i] for e, i in lab.rows_of(rows)]))
        current = step.batch.current()
        with torch.no_grad():
            hidden = decoded(books, early._first(old))
        share, other = 1.0, rows.targets
        if mixup:
            _, second = next(queue)
            share = shares[num_checked]
            again = torch.stack([every[e].inputs[i] for e, i in lab.rows_of(second)])
            with torch.no_grad():
                hidden = share * hidden + (1 - share) * decoded(books, early._first(again))
            other = second.targets
        logits = model.head(model._second(hidden))
        loss = F.cross_entropy(late(current.inputs), current.targets, reduction="sum")
        loss = loss + share * F.cross_entropy(logits, rows.targets, reduction="sum")
        loss = (loss + (1 - share) * F.cross_entropy(logits, other, reduction="sum")) / (SIZE + len(current))
        gradients = lab.gradient(model, loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        # centres were fitted in double and are kept so: what the loop does is exact but for its float32 losses
        lab.close(step.after, lab.weights(model), rtol=1e-4, atol=1e-5)
        seen.update(lab.rows_of(current))
        num_checked += 1
    assert num_checked == 2 * 192 / options.get("batch_size", 16)
    assert torch.equal(trainer.state.model.norm.running_mean, recorder.ends[0].norm.running_mean)
    assert all(module.training for module in trainer.state.model.modules())


def test_remind_is_the_plain_loop(lab, monkeypatch):
    check(lab, monkeypatch)


def test_one_row_at_a_time(lab, monkeypatch):
    check(lab, monkeypatch, batch_size=4)


def test_mixed_pairs(lab, monkeypatch):
    check(lab, monkeypatch, mixup=0.3)


def test_the_oracle_needs_the_stored_rows(lab, monkeypatch):
    monkeypatch.setattr(Remind, "penalty", lambda *_: None)
    lab.dies(lambda: check(lab, monkeypatch))


def test_the_oracle_needs_the_quantiser(lab, monkeypatch):
    monkeypatch.setattr(MapQuantiser, "__call__", lambda self, outputs: outputs)
    lab.dies(lambda: check(lab, monkeypatch))


def test_early_layers_do_not_move_under_momentum_and_decay(lab):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    recorder, trainer = lab.run([Remind(replay_batch_size=8)], CLASS, backbone=Deep, optimizer=sgd)
    frozen, now = lab.weights(recorder.ends[0]), lab.weights(trainer.state.model)
    for name in ("first.weight", "first.bias", "norm.weight", "norm.bias"):
        assert torch.equal(frozen[name], now[name]), name
    assert not torch.equal(frozen["second.weight"], now["second.weight"])
    assert not torch.equal(recorder.steps[0].before["first.weight"], frozen["first.weight"])


PASSES = {
    "trace_replay": TraceReplay(rate=50.0),
    "fpf": Fpf("all", steps=5, replay_batch_size=8),
    "kfpf": Kfpf(k=4, modules="all", steps=5, replay_batch_size=8),
}


@pytest.mark.parametrize("is_behind", [True, False])
@pytest.mark.parametrize("num_experiences", [1, 3])
@pytest.mark.parametrize("other", PASSES)
def test_running_statistics_of_early_layers_stay(lab, other, num_experiences, is_behind):
    """Stored codes are what frozen layers say of stored rows, whatever other strategies train on at the end."""
    seen = []

    class Frozen(Remind):
        def on_experience_end(self, state):
            super().on_experience_end(state)
            seen.append(deepcopy(dict(state.model.norm.named_buffers())))

    Frozen.name = "remind"
    strategies = [remind := Frozen(capacity=150, replay_batch_size=SIZE, num_codebooks=5), deepcopy(PASSES[other])]
    stream = toy_stream(CLASS).first(num_experiences)
    _, trainer = lab.run(strategies[:: 1 if is_behind else -1], stream, backbone=Deep)
    model = trainer.state.model
    for name, value in model.norm.named_buffers():
        assert all(torch.equal(value, each[name]) for each in seen), name
    rows = remind.buffer.rows(torch.arange(len(remind.buffer)))
    every = [trainer.state.prepare(e.load().rows(torch.arange(e.num_samples))) for e in stream.experiences]
    inputs = torch.stack([every[e].inputs[i] for e, i in lab.rows_of(rows)])
    model.eval()
    assert (remind.maps.encode(model._first(inputs)) == rows.inputs).float().mean() > 0.999
    model.train()


def test_modes_are_as_found(lab):
    _, trainer = lab.run([Remind(replay_batch_size=8)], CLASS, backbone=Deep, eval_every=5)
    assert all(module.training for module in trainer.state.model.modules())


def test_codes_are_those_of_scikit_learn():
    vectors = torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    found = ProductQuantiser.fitted(vectors, num_codebooks=3, codebook_size=20, seed=5)
    codes = found.encode(vectors)
    assert codes.dtype == torch.uint8 and codes.shape == (300, 3)
    decoded_pieces = []
    for k, piece in enumerate(np.array_split(vectors.numpy(), 3, axis=1)):
        means = KMeans(20, n_init=1, max_iter=25, random_state=5).fit(piece)
        labels = means.predict(piece)
        assert (codes[:, k].numpy() == labels).all()
        decoded_pieces.append(means.cluster_centers_[labels])
    np.testing.assert_array_equal(found.decode(codes).numpy(), np.concatenate(decoded_pieces, axis=1))
    assert (found.encode(found.decode(codes)) == codes).all(), "a centre is its own code"


def test_maps_are_quantised_at_every_position():
    maps = torch.randn(20, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    by_position = ProductQuantiser.fitted(maps.permute(0, 2, 3, 1).reshape(-1, 4), 2, 8, 0)
    quantiser = MapQuantiser(by_position, True, maps.shape[1:])
    codes = quantiser.encode(maps)
    assert codes.shape == (20, 6, 2)
    lab_free = by_position.decode(by_position.encode(maps[7, :, 2, 1][None]))[0]
    torch.testing.assert_close(quantiser(maps)[7, :, 2, 1], lab_free)
    whole = MapQuantiser(ProductQuantiser.fitted(maps.flatten(1), 6, 8, 0), False, maps.shape[1:])
    assert whole.encode(maps).shape == (20, 1, 6) and whole(maps).shape == maps.shape


def test_codebooks_are_no_larger_than_what_there_is():
    vectors = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    found = ProductQuantiser.fitted(vectors, num_codebooks=9, codebook_size=256, seed=0)
    assert [tuple(book.shape) for book in found.codebooks] == [(1, 1), (3, 1)]
    assert torch.equal(found.decode(found.encode(vectors)), vectors)


def offered(buffer, labels, generator):
    rows = torch.arange(len(labels))
    buffer.add(Batch(rows.float(), torch.tensor(labels), rows, rows, raw=rows), generator)


def test_a_full_buffer_gives_up_rows_of_its_largest_class():
    buffer, generator = LargestClass(9), torch.Generator().manual_seed(0)
    offered(buffer, [0] * 9, generator)
    for k, label in enumerate([1, 2, 1, 1, 2, 2], 1):
        offered(buffer, [label], generator)
        counts = buffer.take("targets", torch.arange(9)).bincount(minlength=3)
        assert counts[0] == 9 - k and counts.sum() == 9
    # three of each: the new row's class is then the largest, by one, and one of its four goes
    offered(buffer, [1], generator)
    assert buffer.take("targets", torch.arange(9)).bincount().tolist() == [3, 3, 3]


def test_every_row_of_the_largest_class_goes_equally_often():
    gone = torch.zeros(4)
    for seed in range(4000):
        buffer, generator = LargestClass(4), torch.Generator().manual_seed(seed)
        offered(buffer, [0, 0, 0, 0], generator)
        offered(buffer, [1], generator)
        kept = buffer.take("raw", torch.arange(4))[buffer.take("targets", torch.arange(4)) == 0]
        gone[next(iter(set(range(4)) - set(kept.tolist())))] += 1
    assert ((gone - 1000).abs() < 4 * (4000 * 3 / 16) ** 0.5).all(), gone


def test_the_rate_of_a_class_decays(lab):
    strategy = Remind(class_decay=0.5, class_decay_every=10)
    assert strategy._rate([0, 1]) == 1
    strategy.maps, strategy.num_streamed = object(), {0: 25, 1: 9, 2: 10**6}
    assert strategy._rate([0]) == 0.25 and strategy._rate([1]) == 1 and strategy._rate([2]) == 0.01
    assert strategy._rate([0, 1]) == (0.25 + 1) / 2
    recorder, trainer = lab.run([Remind(class_decay=0.5, class_decay_every=40)], CLASS)
    assert trainer.state.optimizer.param_groups[0]["lr"] == lab.lr
    moved = [
        (s.after["head.weight"] - s.before["head.weight"]).norm() / s.gradients["head.weight"].norm()
        for s in recorder.steps
    ]
    assert float(moved[0]) == pytest.approx(lab.lr)
    # the last step's classes have been seen 88 times each, or nearly so: twice forty
    assert float(moved[-1]) == pytest.approx(lab.lr / 4)


def test_the_rate_is_that_of_all_rows_of_a_step(lab):
    """Four micro-batches; the share is found again from the labels of all of them, and differs from the last one's."""
    strategy = Remind(class_decay=0.5, class_decay_every=10)
    recorder, _ = lab.run([strategy], CLASS, batch_size=4, accumulation=4)
    pieces, streamed, num_told_apart = recorder.steps[-96:], dict.fromkeys(range(6), 0), 0
    assert {piece.experience for piece in pieces} == {1, 2}
    for k in range(0, 96, 4):
        labels = [piece.batch.current().targets.tolist() for piece in pieces[k : k + 4]]
        shares = [[max(0.01, 0.5 ** (streamed[label] // 10)) for label in some] for some in labels]
        whole = sum(map(sum, shares)) / 16
        last = pieces[k + 3]
        change = last.after["head.weight"] - last.before["head.weight"]
        lab.close(change, -whole * lab.lr * last.gradients["head.weight"])
        num_told_apart += abs(whole - sum(shares[-1]) / 4) > 1e-3
        for label in chain(*labels):
            streamed[label] += 1
    assert num_told_apart > 3


def test_crops_stay_inside():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(8.0).expand(200, 1, 8, 8)
    crops = resized_crops(ramp, generator)
    assert crops.shape == ramp.shape and crops.min() >= 0 and crops.max() <= 7
    # along a ramp a crop is a ramp too, as steep as the crop is wide
    steep = (crops[:, 0, 0, 5] - crops[:, 0, 0, 2]) / 3
    assert steep.min() > (2 / 7 * 3 / 4) ** 0.5 - 0.01 and steep.max() <= 1 + 1e-5
    torch.testing.assert_close(crops, crops[:, :, :1].expand_as(crops))


@pytest.mark.parametrize("concentration", [0.1, 2.0])
def test_beta_has_its_moments(concentration):
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([beta(concentration, generator) for _ in range(4000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.03)
    assert draws.var() == pytest.approx(1 / (4 * (2 * concentration + 1)), rel=0.08)


def test_bad_input_is_refused(lab):
    for name, value in (("cut", 0), ("codebook_size", 300), ("class_decay", 2.0), ("replay_batch_size", None)):
        with pytest.raises(UserError, match=rf"remind\.{name} is {value}"):
            Remind(**{name: value})
    with pytest.raises(UserError, match=r"remind\.cut is 3; Deep has 2 stages"):
        lab.run([Remind(cut=3)], CLASS, backbone=Deep)
