"""GeRe against hand numbers, and against a plain loop that knows the original model and nothing of codes."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cl.config import TrainerConfig
from cl.core import Setting, Source, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies import gere as module
from strategies._imitation import Kl, Said
from strategies._ternary import Moments, classes, margin_terms, packed, unpacked
from strategies.gere import Gere
from strategies.lwf import Lwf

TEXT = Setting.CONTINUAL_PRETRAINING
SIZE, SAMPLES, WEIGHT, LR, MARGIN = 6, 40, 0.7, 0.8, 0.5


def trained(lab, strategy, backbone=None, optimizer=None, stream=None, **config):
    """A float64 run on the toy text with a recorder at its end."""
    recorder = lab.Recorder()
    trainer = Trainer(
        stream or toy_stream(TEXT),
        backbone or (lambda info: ToyNet(info).double()),
        [strategy, recorder],
        optimizer=optimizer or partial(torch.optim.SGD, lr=LR),
        config=TrainerConfig(**({"epochs": 1, "batch_size": lab.batch_size, "device": "cpu"} | config)),
    )
    trainer.run()
    return recorder, trainer


# codes and the margin loss, by hand


def test_codes_are_two_bits_each_the_first_unit_lowest():
    codes = torch.tensor([[-1, 0, 1, 1, 0, -1], [1, 1, 1, 1, 1, 1]])
    # code + 1 = 0 1 2 2 | 1 0 and 2 2 2 2 | 2 2
    wanted = [[0 + 1 * 4 + 2 * 16 + 2 * 64, 1], [2 + 8 + 32 + 128, 2 + 8]]
    assert packed(codes).tolist() == wanted
    assert packed(codes).dtype == torch.uint8
    assert torch.equal(unpacked(packed(codes), 6), codes.to(torch.int8))
    many = torch.randint(-1, 2, (3, 5, 97), generator=torch.Generator().manual_seed(0))
    assert packed(many).shape == (3, 5, 25)
    assert torch.equal(unpacked(packed(many), 97), many.to(torch.int8))


def test_thresholds_are_mean_and_deviation_also_far_from_zero():
    rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 30.0, 1e4])
    moments = Moments()
    for some in rows.split(77):
        moments.add(some)
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    torch.testing.assert_close(moments.deviation, rows.double().std(0, correction=0), rtol=1e-9, atol=0)
    one = Moments()
    one.add(torch.tensor([[1.0], [3.0]]))
    assert (one.mean.item(), one.deviation.item()) == (2.0, 1.0)
    assert classes(torch.tensor([1.0, 2.9, 3.0]), torch.ones(3), 3 * torch.ones(3)).tolist() == [-1, 0, 1]


def test_margin_loss_by_hand():
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 2.0])
    z = torch.tensor([[0.5, 0.0], [3.0, -4.0], [9.0, 9.0]])
    codes = torch.tensor([[-1, 1], [0, 0], [-1, 0]])
    counted = torch.tensor([True, True, False])
    # 0.5 is 1.5 above low; 0 is 2 below high; 3 is 2 above high; -4 is 3 below low; the last token is left out
    total, count = margin_terms(z, codes, low, high, counted)
    assert (total.item(), count.item()) == (pytest.approx(1.5 + 2 + 2 + 3), 4)
    assert margin_terms(z, codes, low, high, counted, "all")[1].item() == 4
    fine = torch.tensor([[-1.5, 0.0], [0.5, 2.5]])
    some = torch.tensor([[-1, 0], [0, 1]])
    assert [each.item() for each in margin_terms(fine, some, low, high, torch.ones(2, dtype=torch.bool))] == [0, 0]


def test_divergence_with_the_likeliest_tokens_and_the_rest():
    old, new = torch.tensor([[[0.5, 0.25, 0.15, 0.1]]]).log(), torch.tensor([[[0.4, 0.1, 0.3, 0.2]]]).log()
    said = partial(Said, torch.zeros(1, 1, 1), counted=torch.tensor([[True]]))
    for top_k in (None, 4):
        kl = Kl(1.0, top_k)
        p, q = (0.5, 0.25, 0.15, 0.1), (0.4, 0.1, 0.3, 0.2)
        found = kl.loss(said(logits=new), kl.kept(said(logits=old), {}), {}).item()
        assert found == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-5)
    kl = Kl(1.0, 2)
    kept = kl.kept(said(logits=old), {})
    assert kept["tokens"].tolist() == [[[0, 1]]]
    p, q = (0.5, 0.25, 0.25), (0.4, 0.1, 0.5)
    found = kl.loss(said(logits=new), kept, {}).item()
    assert found == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-5)


# the whole loss and the step


def imitation(kind, new, old, thresholds):
    """Plain losses on outputs of two models; nothing is coded."""
    z, h = new.hidden, old.hidden
    if kind == "kl":
        p, q = ((each.logits / 2).softmax(-1) for each in (old, new))
        return (p * (p / q).log()).sum(-1).mean()
    if kind in ("l1", "l2"):
        return ((z - h).abs() if kind == "l1" else (z - h) ** 2).mean()
    if kind == "ce":
        return torch.zeros(())
    low, high = thresholds
    total, count = torch.zeros(()), 0
    for unit in range(z.shape[-1]):
        for value, was in zip(z[..., unit].flatten(), h[..., unit].flatten(), strict=True):
            if was <= low[unit]:
                v = value - low[unit]
            elif was >= high[unit]:
                v = high[unit] - value
            else:
                v = torch.maximum(value - high[unit], low[unit] - value)
            if v > 0:
                total, count = total + v, count + 1
    return total / (count + 1e-8)


def check(lab, kind, weight, general_weight=None, source="first"):
    strategy = Gere(
        kind, weight, general_weight, samples=SAMPLES, general_batch_size=SIZE, source=source, since=1, margin=MARGIN
    )
    recorder, trainer = trained(lab, strategy)
    stream = trainer.state.stream
    data = stream.experiences[0].load() if source == "first" else stream.general()
    chosen = data.rows(torch.arange(SAMPLES) * len(data) // SAMPLES)
    original = recorder.ends[0]
    hidden = original(chosen).hidden.flatten(0, 1)
    thresholds = [hidden.mean(0) + sign * MARGIN * hidden.std(0, correction=0) for sign in (-1, 1)]
    model, seen = deepcopy(recorder.start), []
    # not the first step after the original was looked at: the distance is 0 there, and a weight divided by it is noise
    steps = [recorder.steps[number] for number in (0, 11, 13, 20, -1)]
    for step in steps:
        assert len(step.batch.parts) == (1 if step.experience == 0 else 2)
        if step.experience == 0:
            continue
        part = step.batch.parts[1]
        assert part.source == Source.ANCHOR
        numbers = step.batch.sample_ids[part.rows]
        seen += numbers.tolist()
        current, general = step.batch.current(), chosen[numbers]
        assert torch.equal(general.inputs, step.batch.inputs[part.rows])
        model.load_state_dict(step.before)

        def ce(rows, model=model):
            return F.cross_entropy(model(rows).logits.flatten(0, 1), rows.targets.flatten())

        n, m = len(current), len(general)
        if general_weight is None:
            loss = (n * ce(current) + m * ce(general)) / (n + m)
        else:
            loss = ce(current) + general_weight * ce(general)
        with torch.no_grad():
            old = original(general)
        extra = imitation(kind, model(general), old, thresholds)
        factor = loss.detach() / (extra.detach() + 1e-8) if weight == "dynamic" else weight
        gradients = lab.gradient(model, loss + factor * extra)
        # dynamic weights are large where distances are small, and magnify the float32 in which states are kept
        tolerance = (1e-4, 1e-4) if weight == "dynamic" else (1e-5, 1e-6)
        lab.close(step.after, {name: p - LR * gradients[name] for name, p in step.before.items()}, *tolerance)
    assert len(seen) == 3 * SIZE
    return recorder


@pytest.mark.parametrize(
    ("kind", "weight", "general_weight", "source"),
    [
        ("ce", 1.0, None, "general"),
        ("kl", WEIGHT, 0.3, "first"),
        ("kl", WEIGHT, 0.0, "first"),
        ("l1", WEIGHT, None, "general"),
        ("l2", "dynamic", None, "first"),
        ("tm", WEIGHT, None, "first"),
        ("tm", "dynamic", 0.3, "general"),
    ],
)
def test_gere_is_the_plain_loss(lab, kind, weight, general_weight, source):
    check(lab, kind, weight, general_weight, source)


@pytest.mark.parametrize("part", ["imitation", "labels"])
def test_the_oracle_needs_both_parts(lab, monkeypatch, part):
    if part == "imitation":
        monkeypatch.setattr(Gere, "_factor", lambda self, state, distance: 0.0)
    else:
        whole = module.added
        monkeypatch.setattr(module, "added", lambda *args: whole(*args[:-1], 0.0))
    lab.dies(lambda: check(lab, "tm", WEIGHT))


@pytest.mark.parametrize(("kind", "weight"), [("tm", "dynamic"), ("tm", 1.0), ("kl", 1.0), ("ce", 1.0)])
def test_a_step_does_not_depend_on_how_it_is_cut(lab, kind, weight):
    """Denominator, dynamic weight and the share of general rows are those of the whole step."""

    def final(**config):
        strategy = Gere(kind, weight, samples=SAMPLES, general_batch_size=SIZE, since=1, margin=MARGIN)
        recorder, _ = trained(lab, strategy, **config)
        return recorder.steps[-1].after

    whole = final(batch_size=16)
    for size in (8, 4):
        lab.close(final(batch_size=size, accumulation=16 // size), whole, 1e-4, 1e-5)


def test_general_rows_come_in_turns(lab):
    strategy = Gere("ce", samples=10, general_batch_size=4, since=1)
    recorder, _ = trained(lab, strategy)
    numbers = [n for s in recorder.steps if s.experience for n in s.batch.sample_ids[s.batch.parts[1].rows].tolist()]
    turns = [numbers[low : low + 10] for low in range(0, len(numbers) - 9, 10)]
    assert len(turns) == 9 and all(sorted(turn) == list(range(10)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 5


@pytest.mark.parametrize("kind", ["kl", "l1", "l2", "tm"])
def test_imitation_of_the_model_itself_is_nothing(lab, kind):
    terms = []

    class Watch(Strategy):
        settings = frozenset({TEXT})

        def penalty(self, state, batch, output):
            terms.append(state.strategies[0].penalty(state, batch, output))

    strategy = Gere(kind, samples=SAMPLES, general_batch_size=SIZE, margin=MARGIN)
    Trainer(
        toy_stream(TEXT),
        lambda info: ToyNet(info).double(),
        [strategy, Watch()],
        optimizer=partial(torch.optim.SGD, lr=LR),
        config=TrainerConfig(max_steps=30, device="cpu", batch_size=16),
    ).run()
    assert terms[0].item() == pytest.approx(0, abs=1e-6)
    assert terms[-1].item() > 1e-3


def test_a_larger_weight_keeps_more_codes(lab):
    """And the share of units that left their region is written down after every experience."""
    flips = []
    for weight in (1e-9, 1.0, 30.0):
        strategy = Gere("tm", weight, 0.1, SAMPLES, SIZE, since=1, margin=MARGIN, reduction="all")
        recorder, trainer = trained(lab, strategy)
        rows = trainer.state.stream.general().rows(torch.arange(SAMPLES) * 192 // SAMPLES)
        then, now = (model(rows).hidden.double() for model in (recorder.ends[0], trainer.state.model))
        low, high = (then.flatten(0, 1).mean(0) + s * MARGIN * then.flatten(0, 1).std(0, correction=0) for s in (-1, 1))
        flips.append((classes(now, low, high) != classes(then, low, high)).double().mean().item())
        noted = [(stage, value) for name, stage, _, value in trainer.ledger.result.extra if name == "code_flips"]
        assert [stage for stage, _ in noted] == [1, 2]
        assert noted[-1][1] == pytest.approx(flips[-1], abs=1e-4)
    assert flips[2] < 0.7 * flips[0], flips


def test_a_layer_inside_is_read_and_left_as_found(lab):
    strategy = Gere("l2", samples=8, layer="first")
    _, trainer = trained(lab, strategy, max_steps=1, epochs=None)
    rows = trainer.state.stream.general().rows(torch.arange(8) * 192 // 8)
    recorder, _ = trained(lab, Gere("l2", samples=8, layer="first"), max_steps=1, epochs=None)
    torch.testing.assert_close(strategy.kept["states"], recorder.start.first(rows.inputs).float())
    assert not any(each._forward_hooks for each in trainer.state.model.modules())


@pytest.mark.parametrize("size", [1, 8])
def test_what_a_teacher_says_is_not_listened_to(lab, size):
    """lwf asks its teacher between the step's own pass and the penalty, on the same module."""
    terms = []

    class Watch(Strategy):
        settings = frozenset({TEXT})

        def penalty(self, state, batch, output):
            gere = state.strategies[1]
            if gere.kept:
                (part,) = batch.parts_of("gere")
                numbers = batch.sample_ids[part.rows]
                with torch.no_grad():
                    now = state.model.first(batch.inputs[part.rows])
                plain = (now.float() - gere.kept["states"][numbers]).square().mean()
                terms.append((gere.penalty(state, batch, output), plain))

    strategies = [Lwf(), Gere("l2", source="first", samples=SAMPLES, general_batch_size=size, layer="first"), Watch()]
    lab.run(strategies, TEXT)
    assert len(terms) == 24
    for found, plain in terms:
        assert found.requires_grad
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_first_tokens_can_be_left_out(lab):
    stream = toy_stream(TEXT)
    stream = replace(stream, info=replace(stream.info, separator=3))
    data = stream.general()
    data.inputs[:, 4] = 3
    stream = replace(stream, general=lambda: data)
    strategy = Gere("tm", samples=16, exclude_first=True)
    _, trainer = trained(lab, strategy, stream=stream, max_steps=1, epochs=None)
    rows = trainer.state.prepare(strategy.general)
    said = strategy._on(trainer.state, rows, trainer.state.model(rows), slice(None))
    assert not said.counted[:, 0].any() and not said.counted[:, 4].any()
    assert torch.equal(said.counted, (rows.inputs != 3) & (torch.arange(8) > 0))


class Dropped(ToyNet):
    def features(self, inputs):
        return F.dropout(super().features(inputs), 0.5, self.training)


@pytest.mark.parametrize("kind", ["l1", "l2", "kl", "tm"])
def test_only_tokens_that_count_are_imitated(lab, kind):
    """In what is fitted and in the loss; the original model speaks in evaluation mode, without dropout."""
    strategy = Gere(kind, samples=16, exclude_first=True, margin=MARGIN)
    recorder, trainer = trained(lab, strategy, lambda info: Dropped(info).double(), epochs=2)
    rows, original = trainer.state.prepare(strategy.general), recorder.start.eval()
    with torch.no_grad():
        old, new = original(rows), trainer.state.model.eval()(rows)
    h = old.hidden[:, 1:].flatten(0, 1)
    thresholds = [h.mean(0) + sign * MARGIN * h.std(0, correction=0) for sign in (-1, 1)]
    if kind == "tm":
        lab.close(torch.stack([strategy.fitted["low"], strategy.fitted["high"]]), torch.stack(thresholds), 1e-6, 1e-6)
    found = strategy.imitation.loss(strategy._on(trainer.state, rows, new, slice(None)), strategy.kept, strategy.fitted)
    later = [replace(each, logits=each.logits[:, 1:], hidden=each.hidden[:, 1:]) for each in (new, old)]
    wanted = imitation(kind, *later, thresholds)
    assert wanted > 1e-4
    lab.close(found, wanted, 1e-4, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_models_of_transformers(lab, lora):
    pytest.importorskip("transformers")
    from cl.backbones.hf import Hf
    from streams.builtin_text import builtin_text

    stream = builtin_text(context=16, train_tokens=640, eval_tokens=320)
    strategy = Gere("tm", samples=20, general_batch_size=4)
    seen = SimpleNamespace(terms=[])

    class Watch(Strategy):
        settings = frozenset({TEXT})

        def penalty(self, state, batch, output):
            seen.terms.append(strategy.penalty(state, batch, output))

    trainer = Trainer(
        stream,
        partial(Hf, lora=lora),
        [strategy, Watch()],
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        config=TrainerConfig(batch_size=8, device="cpu"),
    )
    frozen = {name: p.clone() for name, p in trainer.state.model.named_parameters() if not p.requires_grad}
    trainer.run()
    assert seen.terms[0].item() == pytest.approx(0, abs=1e-5)
    assert seen.terms[-1].item() > 1e-3
    assert bool(frozen) == bool(lora)
    now = dict(trainer.state.model.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in frozen.items())


# what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "mse"}, "gere.loss is 'mse'"),
        ({"weight": "auto"}, "gere.weight is 'auto'"),
        ({"weight": -1.0}, "gere.weight is -1.0"),
        ({"weight": True}, "gere.weight is True"),
        ({"layer": 3}, "gere.layer is 3; it must be the path of a module"),
        ({"samples": 0}, "gere.samples is 0"),
        ({"source": "web"}, "gere.source is 'web'"),
        ({"source": "first", "since": 0}, "gere.since is 0"),
        ({"since": 3}, "gere.since is 3"),
        ({"layer": "blocks.9"}, "no module of ToyNet; it has"),
    ],
)
def test_bad_values_are_one_sentence(lab, options, words):
    with pytest.raises(UserError, match=words) as error:
        trained(lab, Gere(**options))
    assert "\n" not in str(error.value)


def test_no_general_text_is_refused_before_training(lab):
    without = replace(toy_stream(TEXT), general=None)
    with pytest.raises(UserError, match=r"stream toy_continual_pretraining has none: set stream\.general"):
        trained(lab, Gere(), stream=without)
    trained(lab, Gere(source="first"), stream=without, max_steps=1, epochs=None)
