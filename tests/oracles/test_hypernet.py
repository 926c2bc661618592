"""Hypernetworks against a plain loop: chunks by hand, weights by hand, look-ahead by a cloned optimizer."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.core import Output, Setting, UserError
from cl.testing import ToyNet, toy_stream
from strategies import _hypernet_conditions, _hypernet_strategy, hypernet
from strategies._hypernet import entropy
from strategies.generative_replay import GenerativeReplay
from strategies.hyper_interval import HyperInterval
from strategies.hypernet import Hypernet
from strategies.rnn_hypernet import RnnHypernet

ADAM = partial(torch.optim.Adam, lr=0.01)
BETA = 0.5
OPTIONS = {"chunk_size": 300, "hidden": (10,), "embedding": 5, "chunk_embedding": 3, "beta": BETA, "start": "xavier"}
CLASS, DOMAIN, TASK = Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL


def numbers(p, condition):
    """[e; c_k] -> hidden layer with ReLU -> chunk k; all chunks in a row."""
    chunks = []
    for c in p["generator.chunks_KE"]:
        row = torch.cat([p[f"embeddings.{condition}"], c])
        hidden = (p["generator.body.0.weight"] @ row + p["generator.body.0.bias"]).clamp(min=0)
        chunks.append(p["generator.last.weight"] @ hidden + p["generator.last.bias"])
    return torch.cat(chunks)


def logits(theta, rows, num_outputs):
    """ToyNet's parameters in the order in which they are registered: head, then first layer."""
    sizes = [num_outputs * 12, num_outputs, 12 * 64, 12]
    head, head_bias, first, first_bias = theta[: sum(sizes)].split(sizes)
    hidden = (rows.inputs.flatten(1) @ first.view(12, 64).T + first_bias).clamp(min=0)
    return hidden @ head.view(num_outputs, 12).T + head_bias


def check(lab, setting=DOMAIN, **options):
    recorder, trainer = lab.run([Hypernet(**(OPTIONS | options))], setting, optimizer=ADAM)
    num_outputs = trainer.state.info.num_outputs
    p = {name: value.clone().requires_grad_() for name, value in lab.weights(recorder.start).items()}
    optimizer = ADAM(list(p.values()))
    theta_names = [name for name in p if name.startswith("generator")]
    experience, targets = 0, {}
    length = num_outputs * 13 + 12 * 65
    for step in recorder.steps:
        if step.experience != experience:
            experience = step.experience
            targets = {j: numbers(p, j)[:length].detach() for j in range(experience)}
        for value in p.values():
            value.grad = None
        F.cross_entropy(logits(numbers(p, experience), step.batch, num_outputs), step.batch.targets).backward()
        if targets:
            cloned, ahead = deepcopy((optimizer, p))
            for name in p:
                ahead[name].grad = None if p[name].grad is None else p[name].grad.clone()
            cloned.step()
            moved = {n: v + (ahead[n].detach() - v.detach()) if n in theta_names else v.detach() for n, v in p.items()}
            apart = [(numbers(moved, j)[:length] - target).square().sum() for j, target in targets.items()]
            (BETA * torch.stack(apart).mean()).backward()
        optimizer.step()
        lab.close(step.after, {name: value.detach() for name, value in p.items()}, rtol=1e-5, atol=1e-6)
    assert experience == 2


@pytest.mark.parametrize("setting", [CLASS, DOMAIN, TASK])
def test_hypernet_is_the_plain_loop(lab, setting):
    check(lab, setting)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"lookahead": False}, {"beta": 2 * BETA}])
def test_the_oracle_needs_the_penalty_and_the_lookahead(lab, options):
    lab.dies(lambda: check(lab, **options))


@pytest.mark.parametrize("kind", [Hypernet, RnnHypernet, HyperInterval])
def test_made_rows_without_a_task_have_no_weights(lab, kind):
    small = {"hidden": 20, "latent": 4}
    message = f"{kind.name} answers each row by the weights of its experience, and the rows of generative_replay have"
    for setting in (CLASS, DOMAIN):
        for pair in ([kind(), GenerativeReplay(**small)], [GenerativeReplay(**small), kind()]):
            with pytest.raises(UserError, match=message):
                lab.run(pair, setting)
    net, rows = lab.run([Hypernet(**OPTIONS)], DOMAIN)[1].state.model, toy_stream(DOMAIN).experiences[0].load()
    rows = rows.rows(torch.arange(3))
    rows.experience_id[1] = -1
    with pytest.raises(UserError, match="rows of no experience"):
        net.conditions_of(rows)


def test_made_rows_of_a_task_are_answered_by_its_weights(lab):
    recorder, trainer = lab.run([Hypernet(**OPTIONS), GenerativeReplay(8, hidden=20, latent=4)], TASK, optimizer=ADAM)
    late = recorder.steps[-1]
    made = late.batch[late.batch.parts[1].rows]
    assert set(made.task_id.tolist()) <= {0, 1} and (made.experience_id == -1).all()
    assert torch.equal(trainer.state.model.conditions_of(made), made.task_id)


def test_the_oracle_needs_targets_from_before_the_experience(lab, monkeypatch):
    monkeypatch.setattr(_hypernet_strategy.Generating, "wanted", lambda self, net: net.generated(self.old).detach())
    lab.dies(lambda: check(lab))


def losses(lab, setting=DOMAIN, **options):
    recorder, trainer = lab.run([Hypernet(**(OPTIONS | options))], setting, optimizer=ADAM)
    return [step.terms["cross_entropy"] for step in recorder.steps], trainer


def test_a_copy_of_the_generator_remembers_the_same_as_stored_weights(lab):
    stored, generated = (losses(lab, targets=targets)[0] for targets in ("weights", "generator"))
    assert stored == pytest.approx(generated, rel=1e-9)


def test_without_strength_nothing_is_kept_and_nothing_holds(lab):
    ahead, trainer = losses(lab, beta=0.0)
    assert ahead == losses(lab, beta=0.0, lookahead=False)[0]
    assert not trainer.strategies[0].kept
    # and the first experience is the same at any strength
    assert ahead[:12] == losses(lab)[0][:12]


def test_old_embeddings_stay_and_generated_weights_hardly_move(lab):
    recorder, _ = lab.run([Hypernet(**OPTIONS)], optimizer=ADAM)
    first, last = recorder.ends[0], recorder.ends[-1]
    assert torch.equal(first.embeddings[0], last.embeddings[0])
    loose, _ = lab.run([Hypernet(**(OPTIONS | {"beta": 0.0}))], optimizer=ADAM)
    moved = [(r.ends[0].generated([0]) - r.ends[-1].generated([0])).square().sum() for r in (recorder, loose)]
    assert moved[0] < 0.2 * moved[1]


def test_a_subset_of_old_conditions_is_drawn_for_each_step(lab):
    seen = []

    class Watched(Hypernet):
        name = "hypernet"

        def pull(self, net, parameters=None):
            seen.append(tuple(self.picked))
            value = super().pull(net, parameters)
            embeddings = torch.stack([net.embeddings[self.old[k]].detach() for k in self.picked])
            ahead = torch.func.functional_call(net.generator, parameters, (embeddings,))
            apart = ahead - self.kept["numbers"][self.picked]
            lab.close(value.detach(), self.beta * apart.detach().square().sum() / len(self.picked))
            return value

    stream = toy_stream(DOMAIN, num_experiences=5)
    lab.run([Watched(**(OPTIONS | {"penalty_conditions": 2}))], stream, optimizer=ADAM)
    late = seen[-12:]
    assert all(len(set(picked)) == 2 for picked in late)
    assert set().union(*late) == {0, 1, 2, 3}
    assert losses(lab, penalty_conditions=7)[0] == losses(lab)[0]


# answers


def test_rows_without_a_label_go_to_the_condition_with_the_least_entropy(lab):
    _, trainer = lab.run([Hypernet(**OPTIONS)], CLASS, optimizer=ADAM)
    net = trainer.state.model.eval()
    rows = trainer.state.prepare(lab.plain_sum(lab.stream_of(CLASS), range(3)))
    p = lab.weights(net)
    every = torch.stack([logits(numbers(p, c), rows, 6) for c in range(3)])
    shares = every.softmax(-1)
    chosen = -(shares * shares.log()).sum(-1)
    wanted = every[chosen.argmin(0), torch.arange(len(rows))]
    found = net(rows)
    lab.close(found.logits, wanted)
    assert len(chosen.argmin(0).unique()) > 1
    # whose rows they are makes no difference
    rows.experience_id = torch.zeros_like(rows.experience_id)
    assert torch.equal(net(rows).logits, found.logits)
    net.seen[1:] = False
    lab.close(net(rows).logits, every[0])


def test_mixed_training_rows_are_answered_by_their_own_weights(lab):
    _, trainer = lab.run([Hypernet(**OPTIONS)], optimizer=ADAM)
    net = trainer.state.model.train()
    rows = trainer.state.prepare(lab.plain_sum(lab.stream_of(DOMAIN), range(3)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    mixed = rows[order]
    p, found = lab.weights(net), net(mixed)
    for c in range(3):
        own = mixed.experience_id == c
        lab.close(found.logits[own], logits(numbers(p, c), mixed[own], 4))


def test_entropy_is_finite_where_a_class_is_ruled_out():
    assert entropy(torch.tensor([[0.0, -1e9]])).tolist() == [0.0]


def test_experiences_that_share_a_domain_share_their_embedding():
    stream = toy_stream(DOMAIN)
    again = [*stream.experiences, stream.experiences[0]]
    assert _hypernet_conditions.conditions(type(stream)(stream.info, again, stream.eval_sets)) == ([0, 1, 2, 0], 3)


class Remembering(ToyNet):
    """Writes what its own weights say of a batch after each step, and would compute again in the backward pass."""

    is_checkpointed = True

    def __init__(self, info):
        super().__init__(info)
        self.register_buffer("memory", torch.zeros(12))

    def forward(self, batch, start=0):
        return replace(super().forward(batch, start), state=len(batch))

    def commit(self, batch, output):
        self.memory.copy_(self.features(batch.inputs).mean(0))


def test_memory_is_committed_with_the_weights_of_the_batch(lab):
    recorder, trainer = lab.run([Hypernet(**OPTIONS)], DOMAIN, backbone=Remembering, optimizer=ADAM)
    net, rows = trainer.state.model, recorder.steps[-1].batch
    length = 4 * 13
    theta = numbers(lab.weights(net), 2)[length : length + 12 * 65]
    first, bias = theta.split([12 * 64, 12])
    lab.close(net.backbone.memory, (rows.inputs.flatten(1) @ first.view(12, 64).T + bias).relu().mean(0))
    assert net.backbone.is_checkpointed is False
    mixed = trainer.state.prepare(lab.plain_sum(lab.stream_of(DOMAIN), range(3)))
    with pytest.raises(UserError, match=r"backbone Remembering keeps memory.*rows of one experience only"):
        net.backbone.commit(mixed, Output(torch.zeros(0)))


# what is kept and noted


def test_importance_is_the_fisher_information_of_the_generated_weights(lab):
    strategy = Hypernet(**(OPTIONS | {"importance_rows": 1000}))
    recorder, trainer = lab.run([strategy], optimizer=ADAM)
    p = lab.weights(recorder.ends[-1])
    rows = trainer.state.prepare(lab.plain_sum(lab.stream_of(DOMAIN), range(2, 3)))
    theta = numbers(p, 2)[: 4 * 13 + 12 * 65].requires_grad_()
    total = torch.zeros_like(theta)
    for k in range(len(rows)):
        row = rows[k : k + 1]
        (g,) = torch.autograd.grad(F.cross_entropy(logits(theta, row, 4), row.targets), theta)
        total += g.square()
    lab.close(strategy.importance["2"], total / total.mean(), rtol=1e-5)
    assert sorted(strategy.importance) == ["0", "1", "2"]


def test_the_compression_is_noted(lab):
    _, trainer = lab.run([Hypernet(**OPTIONS)], TASK, optimizer=ADAM)
    noted = [entry for entry in trainer.ledger.result.extra if entry[0] == "hypernet_compression"]
    assert [entry[1] for entry in noted] == [0, 1, 2]
    assert noted[0][3] == trainer.state.model.compression


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": -1}, r"hypernet\.beta is -1"),
        ({"chunk_size": 0}, r"hypernet\.chunk_size is 0; it must be an integer of at least 1, or null"),
        ({"hidden": 32}, r"hypernet\.hidden is 32; it must be a list"),
        ({"activation": "gelu"}, r"hypernet\.activation is 'gelu'; it must be one of relu, elu, tanh, sigmoid"),
        ({"heads": "two"}, r"hypernet\.heads is 'two'; it must be one of one, every"),
        ({"start": "zero"}, r"hypernet\.start is 'zero'; it must be one of backbone, xavier"),
        ({"targets": "rows"}, r"hypernet\.targets is 'rows'; it must be one of weights, generator"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Hypernet(**options)


def test_an_optimizer_that_cannot_be_foreseen_is_refused(lab):
    with pytest.raises(UserError, match=r"hypernet\.lookahead foresees the updates of SGD.*Adagrad"):
        lab.run([Hypernet(**OPTIONS)], optimizer=partial(torch.optim.Adagrad, lr=0.01))
    assert hypernet.Hypernet(**OPTIONS).lookahead
