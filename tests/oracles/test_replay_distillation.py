"""Replay with two distillations against the terms written out, with a teacher that is a copy of the recorded model."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from cl.core import Output, Setting, UserError
from cl.testing import toy_stream
from strategies.replay import Replay
from strategies.replay_distillation import ReplayDistillation

SIZE, TEMPERATURE, STRENGTH = 10, 2.0, 0.9
CLASS, DOMAIN = Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL


def shares(features, predictions, num_stored, num_rows, num_old, num_seen):
    """a and k, as the docstring defines them."""
    by_classes, by_rows = math.log(1 + num_old / num_seen), math.sqrt(num_stored / num_rows)
    table = {"none": 0.0, "replayed": by_rows, "all": by_classes}
    return STRENGTH * table[features], STRENGTH * table[predictions]


def kl(old, new, columns):
    """sum p log(p / q), divided by the number of entries."""
    p, q = (((logits[:, columns]) / TEMPERATURE).exp() for logits in (old, new))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return TEMPERATURE**2 * (p * (p.log() - q.log())).sum() / p.numel()


def check(lab, features="replayed", predictions="all", setting=CLASS):
    strategy = ReplayDistillation(40, SIZE, features, predictions, TEMPERATURE, STRENGTH)
    recorder, _ = lab.run([strategy], setting)
    model, num_checked = deepcopy(recorder.start), 0
    for step in recorder.steps:
        current, *stored = [step.batch[part.rows] for part in step.batch.parts]
        together = model(step.batch)
        nll = -together.logits.log_softmax(1)[range(len(step.batch)), step.batch.targets].mean()
        loss = nll
        if step.experience > 0:
            assert len(stored) == 1 and len(stored[0]) == SIZE
            num_old = 2 * step.experience if setting == CLASS else 4
            num_seen = num_old + 2 if setting == CLASS else 4
            a, k = shares(features, predictions, SIZE, SIZE + len(current), num_old, num_seen)
            teacher = deepcopy(recorder.ends[step.experience - 1]).eval()
            penalty = 0.0
            if features != "none":
                rows = stored[0] if features == "replayed" else step.batch
                penalty = penalty + a * (model(rows).hidden - teacher(rows).hidden.detach()).square().mean()
            if predictions != "none":
                rows = stored[0] if predictions == "replayed" else step.batch
                columns = list(range(num_old))
                penalty = penalty + k * kl(teacher(rows).logits.detach(), model(rows).logits, columns)
            loss = (1 - (a if features != "none" else k)) * nll + penalty
            value = penalty.item()
            lab.close(step.terms.get("replay_distillation", 0.0), value, rtol=1e-5)
            num_checked += value > 1e-6
        gradients = lab.gradient(model, loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model), rtol=1e-5, atol=1e-6)
    assert num_checked > 5


CASES = [case for case in product(("none", "replayed", "all"), repeat=2) if case != ("none", "none")]


@pytest.mark.parametrize(("features", "predictions"), CASES)
def test_distillation_is_the_plain_loop(lab, features, predictions):
    check(lab, features, predictions)


@pytest.mark.parametrize(("features", "predictions"), [("all", "all"), ("replayed", "replayed")])
def test_a_step_in_micro_batches_is_the_same(lab, features, predictions):
    """Ten stored rows beside micro-batches of four, which they cannot be shared among evenly."""
    whole, cut = (
        lab.run(
            [ReplayDistillation(40, SIZE, features, predictions)], CLASS, batch_size=16 // pieces, accumulation=pieces
        )[1].state.model
        for pieces in (1, 4)
    )
    lab.close(lab.weights(cut), lab.weights(whole), rtol=1e-5, atol=1e-6)


def test_domains_share_their_outputs(lab):
    check(lab, setting=DOMAIN)


@pytest.mark.parametrize("off", ["_feature_distance", "_divergence"])
def test_the_oracle_needs_both_terms(lab, off, monkeypatch):
    monkeypatch.setattr(ReplayDistillation, off, lambda self, new, *_: new.logits.sum() * 0.0)
    lab.dies(lambda: check(lab))


def test_the_oracle_needs_the_share_of_the_labels(lab, monkeypatch):
    monkeypatch.setattr(ReplayDistillation, "_taken_from_labels", lambda *_: 0.0)
    lab.dies(lambda: check(lab))


@pytest.mark.parametrize("arguments", [{"strength": 0.0}, {"features": "none", "predictions": "none"}])
def test_without_distillation_it_is_replay(lab, arguments):
    strategy = ReplayDistillation(40, SIZE, **arguments)
    plain = Replay(40, SIZE, policy="class_balanced", update="experience_end", average="row")
    # they draw from generators of their own name
    plain.name = strategy.name
    found, wanted = (lab.run([each], CLASS)[0].steps[-1].after for each in (strategy, plain))
    lab.close(found, wanted, rtol=0, atol=0)
    assert strategy.cost(None, 16).forwards == SIZE


def test_every_class_has_its_share(lab):
    _, trainer = lab.run([ReplayDistillation(40, SIZE)], CLASS)
    buffer = trainer.strategies[0].buffer
    kept = buffer.take("targets", torch.arange(len(buffer))).bincount()
    assert len(kept) == 6 and min(kept) == 40 // 6


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="features is 'some'; it must be one of none, replayed, all"):
        ReplayDistillation(features="some")
    with pytest.raises(UserError, match=r"strength is 2.0; it must be between 0 and 1"):
        ReplayDistillation(strength=2.0)
    stream = toy_stream(CLASS)
    nameless = replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences])
    with pytest.raises(UserError, match="distils the outputs of old classes and counts them, and experience 0"):
        ReplayDistillation().check(nameless)


def test_classes_that_are_counted_must_be_named():
    """Of the last experience too where they are part of C_seen."""
    stream = toy_stream(CLASS)
    *earlier, last = stream.experiences
    stream = replace(stream, experiences=[*earlier, replace(last, classes=())])
    for options in (("all", "none"), ("none", "all"), ("replayed", "all")):
        with pytest.raises(UserError, match="and experience 2"):
            ReplayDistillation(40, SIZE, *options).check(stream)
    ReplayDistillation(40, SIZE, "replayed", "replayed").check(stream)


def test_features_that_need_no_classes_go_without_names(lab):
    stream = toy_stream(DOMAIN)
    nameless = replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences])
    recorder, _ = lab.run([ReplayDistillation(40, SIZE, "replayed", "none")], nameless)
    assert recorder.steps[-1].terms["replay_distillation"] > 0


class Bare(nn.Sequential):
    """A network that is no backbone: it gives logits and nothing else."""

    def __init__(self, info):
        super().__init__(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, info.num_outputs))

    def forward(self, batch):
        return Output(super().forward(batch.inputs.flatten(1)))


def test_features_need_a_backbone_that_gives_them(lab):
    with pytest.raises(UserError, match="replay_distillation needs a backbone with features"):
        lab.run([ReplayDistillation(40, SIZE)], CLASS, backbone=Bare)
    recorder, _ = lab.run([ReplayDistillation(40, SIZE, "none", "all")], CLASS, backbone=Bare)
    assert recorder.steps[-1].terms["replay_distillation"] > 0
