"""RECALL: the merge written out, from recorded models and representations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import strategies.recall_merge as module
from cl.backbones import Backbone, Stage
from cl.core import Setting, UserError
from cl.testing import ToyNet
from strategies.recall_merge import RecallMerge, centres, distances, similarity


def watched(lab, setting=Setting.DOMAIN_INCREMENTAL, read=None, backbone=None, **options):
    """Weights (or what `read` takes of the model) before and after each end of an experience, the typical rows, and the
    run."""
    before, after, typical = [], [], []
    recall = RecallMerge(clusters=12, num_rows=80, **options)
    found = recall._typical
    recall._typical = lambda state: typical.append(found(state)) or typical[-1]

    class Keeper(lab.Recorder):
        def __init__(self, name, kept):
            super().__init__()
            self.name, self.kept = name, kept

        def on_experience_end(self, state):
            self.kept.append((read or lab.weights)(state.model))

    more = {} if backbone is None else {"backbone": backbone}
    recorder, trainer = lab.run([Keeper("before", before), recall, Keeper("after", after)], setting, epochs=2, **more)
    return before, after, typical, recorder, trainer


def kernel(own, other):
    """As in the docstring, pair by pair."""
    n = len(own)
    apart = sum(float((own[i] - own[j]).square().sum()) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    terms = [math.exp(-float((own[i] - other[i]).square().sum()) / (2 * apart)) for i in range(n)]
    return sum(terms) / n


def representations(weights, rows):
    hidden = (rows.inputs.flatten(1) @ weights["first.weight"].T + weights["first.bias"]).relu()
    return {"first": hidden, "head": hidden @ weights["head.weight"].T + weights["head.bias"]}


def check(lab):
    before, after, typical, _, trainer = watched(lab, temperature=0.2)
    for t in (1, 2):
        models, rows = before[: t + 1], typical[t - 1]
        assert 5 <= len(rows) <= 12
        seen = [representations(model, rows) for model in models]
        for layer in ("first", "head"):
            alike = torch.tensor([kernel(seen[-1][layer], each[layer]) for each in seen], dtype=torch.float64)
            shares = (alike / 0.2).softmax(0)
            assert shares[-1] == shares.max() > 1 / (t + 1)
            for key in (f"{layer}.weight", f"{layer}.bias"):
                wanted = sum(share * model[key] for share, model in zip(shares, models, strict=True))
                lab.close(after[t][key], wanted)
    lab.close(after[0], before[0])
    return trainer


def test_layers_are_averaged_by_how_alike_they_represent(lab):
    trainer = check(lab)
    found = {(name, experience): value for name, experience, _, value in trainer.ledger.result.extra}
    assert 1 / 3 < found["stage_0_own", 2] < 1


def test_it_needs_the_similarity(lab, monkeypatch):
    monkeypatch.setattr(module, "similarity", lambda own, other: torch.ones(()))
    lab.dies(lambda: check(lab))


class Deep(ToyNet):
    """Two stages, the second with batch norm."""

    features = Backbone.features

    def __init__(self, info):
        super().__init__(info)
        self.second, self.norm = torch.nn.Linear(12, 12), torch.nn.BatchNorm1d(12)

    def stages(self):
        return (
            Stage(lambda x: self.first(x.flatten(1)).relu(), (self.first,)),
            Stage(lambda h: self.norm(self.second(h)).relu(), (self.second, self.norm)),
        )


def test_every_stage_has_shares_of_its_own(lab):
    """And running statistics are averaged with the stage that they belong to; counts are those of the new model."""

    def everything(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    before, after, typical, _, _ = watched(lab, read=everything, backbone=Deep, temperature=0.2)
    for t in (1, 2):
        x, shares = typical[t - 1].inputs.flatten(1), []
        seen = []
        for w in before[: t + 1]:
            one = F.linear(x, w["first.weight"], w["first.bias"]).relu()
            z = F.linear(one, w["second.weight"], w["second.bias"]) - w["norm.running_mean"]
            two = (z / (w["norm.running_var"] + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]).relu()
            seen.append((one, two, F.linear(two, w["head.weight"], w["head.bias"])))
        for layer in range(3):
            alike = torch.tensor([kernel(seen[-1][layer], each[layer]) for each in seen], dtype=torch.float64)
            shares.append((alike / 0.2).softmax(0))
        assert (shares[0] - shares[1]).abs().max() > 1e-3
        layers = {"first": 0, "second": 1, "norm": 1, "head": 2}
        for key, value in after[t].items():
            if key == "norm.num_batches_tracked":
                assert torch.equal(value, before[t][key])
                continue
            own = shares[layers[key.split(".")[0]]]
            lab.close(value, sum(share * model[key] for share, model in zip(own, before, strict=False)), rtol=1e-5)


@pytest.mark.parametrize("start", ["first", "merged"])
def test_where_experiences_start(lab, start):
    _, after, _, recorder, _ = watched(lab, start=start)
    for experience in (1, 2):
        first = next(step for step in recorder.steps if step.experience == experience)
        lab.close(first.before, after[0] if start == "first" else after[experience - 1])


def test_the_same_start_is_without_momentum(lab):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
    recorder, _ = lab.run([RecallMerge(clusters=12, num_rows=80)], optimizer=sgd)
    for experience in (0, 1, 2):
        first = next(step for step in recorder.steps if step.experience == experience)
        lab.close(first.after, {name: p - 0.1 * first.gradients[name] for name, p in first.before.items()})


def test_heads_of_single_tasks_are_those_that_trained_them(lab):
    before, after, *_ = watched(lab, Setting.TASK_INCREMENTAL)
    for k in range(3):
        name = f"head.heads.{k}.weight"
        lab.close(after[2][name], before[k][name])
    assert not torch.equal(after[2]["first.weight"], before[2]["first.weight"])


def test_similarity_is_one_for_the_same_and_falls_with_distance():
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert similarity(rows, rows) == 1
    values = [float(similarity(rows, rows + shift)) for shift in (0.1, 0.5, 2.0)]
    assert values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(kernel(rows, rows + 0.5), rel=1e-5)


@pytest.mark.parametrize("count", [20, 60])
def test_similarity_far_from_zero(count):
    """As units are that every row switches on: float32 against float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 64, generator=generator) + 1e4
    other = rows + 0.5 * torch.randn(count, 64, generator=generator)
    assert float(similarity(rows, other)) == pytest.approx(kernel(rows.double(), other.double()), rel=1e-4)


@pytest.mark.parametrize("count", [20, 60])
def test_centres_far_from_zero(count):
    """Two clusters that are a unit apart, 10,000 from zero: float32 against float64, each row with its own."""
    generator = torch.Generator().manual_seed(0)
    rows = 0.1 * torch.randn(count, 64, generator=generator) + 1e4
    rows[::2] += 0.5
    found = centres(rows, 2, torch.Generator().manual_seed(3))
    wanted = centres(rows.double(), 2, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-3)
    assert torch.equal(distances(found, rows).argmin(0), torch.cdist(wanted, rows.double()).argmin(0))


def test_centres_are_those_of_the_clusters():
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    rows = corners.repeat_interleave(30, 0) + 0.1 * torch.randn(90, 2, generator=generator)
    best = min(
        (centres(rows, 3, torch.Generator().manual_seed(seed)) for seed in range(8)),
        key=lambda each: float(torch.cdist(rows, each).min(1).values.sum()),
    )
    wanted = torch.stack([rows[k * 30 : (k + 1) * 30].mean(0) for k in range(3)])
    match = F.one_hot(torch.cdist(wanted, best).argmin(1), 3)
    assert match.sum(0).tolist() == [1, 1, 1]
    torch.testing.assert_close(match.float() @ best, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"recall_merge.temperature is 0"),
        ({"clusters": 0}, r"recall_merge.clusters is 0"),
        ({"clusters": 1}, r"recall_merge.clusters is 1; it must be an integer of at least 2"),
        ({"num_rows": 1}, r"recall_merge.num_rows is 1; it must be an integer of at least 2"),
        ({"start": "last"}, r"recall_merge.start is 'last'; it must be one of first, merged"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        RecallMerge(**options)
