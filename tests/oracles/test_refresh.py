"""Refresh learning against displacements, Fisher information and noise that are derived again from the recorded run."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.seeding import Seeds
from cl.testing import ToyNet, equal, train
from strategies.derpp import Derpp
from strategies.ewc import Ewc
from strategies.lwf import Lwf
from strategies.refresh import Refresh
from strategies.replay import Replay

CLASS = Setting.CLASS_INCREMENTAL


class Before(Strategy):
    """Stands right before refresh: notes the weights that it finds, and the Fisher information it will use."""

    name = "before"

    def __init__(self, refresh=None):
        self.refresh, self.weights, self.fishers = refresh, [], []

    def on_batch(self, state, batch):
        self.weights.append({n: p.detach().clone() for n, p in state.model.named_parameters()})
        if self.refresh is not None:
            self.fishers.append(dict(self.refresh.fisher))
        return batch


def refreshed(lab, refresh, others=(), setting=CLASS, **options):
    """A recorded run; returns (weights before, weights after unlearning, step) of every step, and the Fishers used."""
    before = Before(refresh)
    recorder, trainer = lab.run([*others, before, refresh], setting, **options)
    # in paper mode the recorder is asked for its penalty once more, by a step that is not taken
    recorder.steps = [step for step in recorder.steps if step.after]
    moves = list(zip(before.weights, [step.before for step in recorder.steps], recorder.steps, strict=True))
    return moves, before.fishers, recorder, trainer


def plain_fisher(lab, model, rows, weighted):
    """Mean over rows of w g^2, by one backward pass each."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(rows)):
        log_p = model(rows[i : i + 1]).logits.log_softmax(-1)[0, rows.targets[i]]
        for name, g in lab.gradient(model, log_p).items():
            total[name] += (log_p.exp().item() if weighted else 1.0) * g * g / len(rows)
    return total


def rows_of_experience(trainer, k):
    data = trainer.state.stream.experiences[k].load()
    return trainer.state.prepare(data.rows(torch.arange(len(data))))


# the displacement


def check_official(lab, **arguments):
    refresh = Refresh(delta=1e-3, noise=0.0, **arguments)
    moves, fishers, recorder, _ = refreshed(lab, refresh, [Derpp(40, 8)])
    model = deepcopy(recorder.start)
    for (found, after, step), fisher in zip(moves, fishers, strict=True):
        model.load_state_dict(found)
        g = lab.gradient(model, lab.label_loss(model, step.batch.current()))
        for name, theta in found.items():
            wanted = 1e-3 * theta.norm() * g[name] / g[name].norm()
            if fisher:
                wanted = wanted / (1 + refresh.damping * fisher[name])
            lab.close(after[name] - theta, wanted, rtol=1e-5, atol=1e-12)


def test_official_step_is_uphill_and_as_long_as_said(lab):
    check_official(lab)
    check_official(lab, damping=50.0)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("official", {"delta": 1e-5, "noise": 1e-3, "damping": 1e-3, "num_unlearn": 1, "decay": 1e-5}),
        ("paper", {"gamma": 1e-7, "noise": 1.0, "damping": 1.0, "num_unlearn": 1, "decay": 1e-5}),
    ],
)
def test_defaults_are_those_of_the_official_code(mode, wanted):
    """models/derpp.py of joey-wang123/CL-refresh-learning; in paper mode, the noise of its Langevin equation."""
    refresh = Refresh(mode=mode)
    assert {name: getattr(refresh, name) for name in wanted} == wanted
    assert refresh.importance_rows is None and Refresh().mode == "official"


def test_displacement_is_delta_times_the_norm_along_the_gradient(lab):
    """As shipped, noise and damping included: within one percent, for every tensor at every step."""
    moves, _, recorder, _ = refreshed(lab, Refresh())
    model = deepcopy(recorder.start)
    for found, after, step in moves:
        model.load_state_dict(found)
        gradients = lab.gradient(model, lab.label_loss(model, step.batch.current()))
        for name, theta in found.items():
            moved, g = after[name] - theta, gradients[name]
            # noise is 1e-3 per weight against a drift of |theta|: beside it for tensors that are not tiny
            noise = 1e-3 * math.sqrt(theta.numel()) / float(theta.norm())
            assert abs(float(moved.norm() / theta.norm()) / 1e-5 - 1) < 0.01 + noise
            if noise < 0.01:
                assert F.cosine_similarity(moved.flatten(), g.flatten(), dim=0) > 0.999
    assert any(1e-3 * math.sqrt(t.numel()) < 0.01 * float(t.norm()) for t in moves[-1][0].values())


def test_the_oracle_needs_the_displacement(lab, monkeypatch):
    monkeypatch.setattr(Refresh, "_unlearn", lambda *_: None)
    lab.dies(lambda: check_official(lab))


def test_the_oracle_needs_the_norm(lab, monkeypatch):
    monkeypatch.setattr(Refresh, "_displacement", lambda self, p, g, fisher, eps: self.delta * g)
    lab.dies(lambda: check_official(lab))


def check_paper(lab, others, loss_of):
    """Noise off, the displacement is gamma / (F + damping) times the gradient of everything that the step minimises."""
    refresh = Refresh(mode="paper", gamma=1e-2, noise=0.0, damping=0.5)
    moves, fishers, recorder, trainer = refreshed(lab, refresh, others)
    model = deepcopy(recorder.start)
    for (found, after, step), fisher in zip(moves, fishers, strict=True):
        model.load_state_dict(found)
        g = lab.gradient(model, loss_of(model, step, recorder, trainer))
        for name, theta in found.items():
            wanted = 1e-2 * g[name] / (0.5 + (fisher[name] if fisher else 0))
            lab.close(after[name] - theta, wanted, rtol=1e-4, atol=1e-9)


def with_replay(model, step, recorder, trainer):
    groups = [step.batch[part.rows] for part in step.batch.parts]
    return sum(F.cross_entropy(model(rows).logits, rows.targets) for rows in groups)


def test_paper_step_climbs_the_loss_with_its_replay(lab):
    check_paper(lab, [Replay(40, 8)], with_replay)


def test_paper_step_climbs_the_penalties_too(lab):
    def with_ewc(model, step, recorder, trainer):
        loss = lab.label_loss(model, step.batch)
        if step.experience == 0:
            return loss
        anchor, ewc = dict(recorder.ends[0].named_parameters()), plain_fisher(lab, recorder.ends[0], first, False)
        apart = {name: p - anchor[name].detach() for name, p in model.named_parameters()}
        return loss + 10.0 * sum((ewc[name] * d.square()).sum() for name, d in apart.items())

    from cl.testing import toy_stream

    stream = toy_stream(CLASS, num_experiences=2)
    data = stream.experiences[0].load()
    first = lab.stream_of(stream).prepare(data.rows(torch.arange(len(data))))
    original = lab.run
    lab.run = lambda strategies, setting, **options: original(strategies, stream, **options)
    check_paper(lab, [Ewc(20.0, importance_rows=None)], with_ewc)


def test_the_oracle_needs_the_whole_loss(lab, monkeypatch):
    def current_only(self, state, batch):
        current = batch.current()
        return state.label_loss(state.forward(current), current)

    monkeypatch.setattr(Refresh, "_target", current_only)
    lab.dies(lambda: check_paper(lab, [Replay(40, 8)], with_replay))


def test_unlearning_steps_add_up(lab):
    """Two steps, each from where the last one ended."""
    moves, _, recorder, _ = refreshed(lab, Refresh(delta=1e-2, noise=0.0, num_unlearn=2), max_steps=2, epochs=None)
    model = deepcopy(recorder.start)
    found, after, step = moves[0]
    model.load_state_dict(found)
    for _ in range(2):
        g = lab.gradient(model, lab.label_loss(model, step.batch))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += 1e-2 * p.norm() * g[name] / g[name].norm()
    lab.close(after, lab.weights(model), rtol=1e-5)


# noise


def test_official_noise(lab):
    """With the gradient taken away by a huge noise factor, what is left is delta * noise * N(0, 1)."""
    moves, _, _, _ = refreshed(lab, Refresh(delta=1e-9, noise=1e6), max_steps=30, epochs=None)
    eps = torch.cat([(after[n] - found[n]).flatten() for found, after, _ in moves[:30] for n in found]) / 1e-3
    assert abs(float(eps.mean())) < 5 / math.sqrt(len(eps))
    assert abs(float(eps.std()) - 1) < 5 / math.sqrt(2 * len(eps))
    # drawn again, parameter by parameter, from the generator that is its own
    generator = Seeds(0).named("refresh")
    shapes = [p.shape for found, *_ in moves[:30] for p in found.values()]
    drawn = torch.cat([torch.randn(shape, generator=generator, dtype=eps.dtype).flatten() for shape in shapes])
    torch.testing.assert_close(eps, drawn, rtol=0, atol=1e-3)


def test_langevin_noise_has_variance_two_gamma_over_f(lab):
    """Normalised by sqrt(2 gamma / (F + damping)), the noise is standard normal wherever F is large and small."""
    gamma, refresh = 1e-8, Refresh(mode="paper", gamma=1e-8, damping=1e-2)
    moves, fishers, _, _ = refreshed(lab, refresh)
    pieces, sizes = [], []
    for (found, after, _), fisher in zip(moves, fishers, strict=True):
        for name in found if fisher else ():
            inverse = 1 / (fisher[name] + 1e-2)
            pieces.append(((after[name] - found[name]) / (2 * gamma * inverse).sqrt()).flatten())
            sizes.append(fisher[name].flatten())
    eps, fisher = torch.cat(pieces), torch.cat(sizes)
    assert fisher.max() > 10 * 1e-2
    for some in (eps, eps[fisher > 1e-2], eps[fisher < 1e-3]):
        assert len(some) > 100
        assert abs(float(some.std()) - 1) < 5 / math.sqrt(2 * len(some)) + 1e-3


# the Fisher information


@pytest.mark.parametrize(("mode", "weighted"), [("official", True), ("paper", False)])
@pytest.mark.parametrize("setting", [CLASS, Setting.TASK_INCREMENTAL])
def test_fisher_is_the_row_by_row_one(lab, setting, mode, weighted):
    refresh = Refresh(mode=mode, decay=0.25)
    _, _, recorder, trainer = refreshed(lab, refresh, setting=setting)
    wanted = None
    for k in range(3):
        new = plain_fisher(lab, recorder.ends[k], rows_of_experience(trainer, k), weighted)
        wanted = new if wanted is None else {name: 0.25 * wanted[name] + f for name, f in new.items()}
    lab.close(refresh.fisher, wanted, rtol=1e-5, atol=1e-12)
    assert lab.flat(wanted).max() > 1e-4


def test_without_a_fisher_yet_nothing_is_damped(lab):
    """The first experience is the same for every damping; the second is not."""
    runs = [refreshed(lab, Refresh(delta=1e-2, noise=0.0, damping=damping))[2] for damping in (0.0, 100.0)]
    first = [[lab.flat(step.after) for step in run.steps if step.experience == 0] for run in runs]
    assert all(torch.equal(*pair) for pair in zip(*first, strict=True))
    assert not torch.equal(*(lab.flat(run.steps[-1].after) for run in runs))


def test_rows_of_the_fisher_can_be_fewer(lab):
    refresh = Refresh(importance_rows=10)
    _, trainer = lab.run([refresh])
    extra = trainer.state.spent.forwards - 2 * 3 * 192
    assert extra == 3 * (10 + 8 + 8), "ten rows, and eight twice to see how the layers are used"


# what it must leave alone


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_without_a_step_it_is_the_inner_strategy_bit_for_bit(mode):
    plain = train(CLASS, [Derpp(capacity=40)])
    off = train(CLASS, [Derpp(capacity=40), Refresh(mode=mode, delta=0.0, gamma=0.0, noise=0.0)])
    on = train(CLASS, [Derpp(capacity=40), Refresh(mode=mode)])
    assert off.losses == plain.losses
    assert equal(off.weights, plain.weights)
    assert on.losses != plain.losses


def test_running_statistics_see_each_batch_once(lab):
    class Normed(ToyNet):
        def __init__(self, info):
            super().__init__(info)
            self.norm = nn.BatchNorm1d(12)

        def features(self, inputs):
            return self.norm(super().features(inputs))

    for mode in ("official", "paper"):
        _, _, recorder, trainer = refreshed(lab, Refresh(mode=mode), backbone=Normed)
        assert int(trainer.state.model.norm.num_batches_tracked) == len(recorder.steps)


def test_accumulation_unlearns_once_from_the_first_rows(lab):
    before = Before()
    recorder, _ = lab.run([before, Refresh(delta=1e-2, noise=0.0)], CLASS, accumulation=2)
    model, found, step = deepcopy(recorder.start), before.weights[0], recorder.steps[0]
    model.load_state_dict(found)
    g = lab.gradient(model, lab.label_loss(model, step.batch))
    for name, theta in found.items():
        wanted = 1e-2 * theta.norm() * g[name] / g[name].norm()
        lab.close(step.before[name] - theta, wanted, rtol=1e-5, atol=1e-12)
    lab.close(recorder.steps[1].before, step.before, rtol=0, atol=0)


COMPOSITIONS = {
    "derpp": lambda: [Derpp(40, 8)],
    "lwf": lambda: [Lwf()],
    "replay+lwf": lambda: [Replay(40, 8), Lwf()],
    "ewc": lambda: [Ewc()],
}


@pytest.mark.parametrize("others", COMPOSITIONS)
@pytest.mark.parametrize("mode", ["official", "paper"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_cost_of_a_composition_is_declared(mode, others, accumulation):
    """For steps of 16 rows, however they are cut."""
    cut = {"batch_size": 16 // accumulation, "accumulation": accumulation}
    run = train(CLASS, [*COMPOSITIONS[others](), Refresh(mode=mode, num_unlearn=2)], **cut)
    declared = [(cost.forwards, cost.backwards) for cost in run.declared]
    assert declared == [(cost.forwards, cost.backwards) for cost in run.counted]
    assert (run.trainer.state.spent.forwards, run.trainer.state.spent.backwards) == (
        run.tally.forwards,
        run.tally.backwards,
    )


def test_the_whole_loss_must_be_known_when_it_is_unlearnt():
    with pytest.raises(UserError, match=r"put refresh last, as in strategy=\[replay,refresh\]"):
        train(CLASS, [Refresh(mode="paper"), Replay()])
    assert train(CLASS, [Refresh(mode="paper"), Lwf()]).result.status == "done"
    assert train(CLASS, [Refresh(), Replay()]).result.status == "done"


def test_one_experience_has_no_fisher_information_to_go_by():
    from cl.testing import toy_stream

    for refresh, count in ((Refresh(), 1), (Refresh(mode="paper", gamma=0.0), 1), (Refresh(mode="paper"), 2)):
        refresh.check(toy_stream(CLASS, num_experiences=count))
    with pytest.raises(UserError, match=r"stream toy_class_incremental has one experience.*use official"):
        Refresh(mode="paper").check(toy_stream(CLASS, num_experiences=1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "fast"}, "refresh.mode is 'fast'; it must be one of official, paper"),
        ({"delta": -1}, "refresh.delta is -1; it must be a finite number of at least 0"),
        ({"gamma": float("nan")}, "refresh.gamma is nan; it must be a finite number of at least 0"),
        ({"num_unlearn": 0}, "refresh.num_unlearn is 0; it must be an integer of at least 1"),
        ({"noise": -1}, "refresh.noise is -1; it must be a finite number of at least 0"),
        ({"damping": -1}, "refresh.damping is -1; it must be a finite number of at least 0"),
        ({"decay": -0.5}, "refresh.decay is -0.5; it must be a finite number of at least 0"),
        ({"mode": "paper", "damping": 0}, "refresh.damping is 0; it must be above 0 in paper mode, since"),
        ({"importance_rows": 0}, "refresh.importance_rows is 0; it must be an integer of at least 1, or null for all"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(UserError) as found:
        Refresh(**arguments)
    assert str(found.value).startswith(sentence)
