"""Generative kernel learning: ridge regression in its other form, and a VAE trained again by torch.distributions.

The strategy solves for one number per coreset row; here the same predictor is solved for one number per feature.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

from cl.core import Batch, Setting, UserError
from cl.testing import toy_stream
from strategies import generative_kernel
from strategies._vae import Generator
from strategies.generative_kernel import GenerativeKernel

TASK = Setting.TASK_INCREMENTAL
RIDGE, SCALE, SIZE, CONTRAST = 0.3, 4.0, 6, 2.0
SMALL = {"hidden": 20, "latent": 4, "generator_lr": 0.01, "coreset_size": SIZE, "ridge": RIDGE, "scale": SCALE}
NUM_CLASSES = 4


def ridge(features, core, targets):
    """phi(x)^T (phi(X)^T phi(X) + ridge * I)^-1 phi(X)^T Y, with rows at length 1."""
    a, b = (h / h.norm(dim=1, keepdim=True) for h in (features, core))
    y = torch.eye(NUM_CLASSES, dtype=b.dtype)[targets]
    return a @ torch.linalg.solve(b.T @ b + RIDGE * torch.eye(b.shape[1], dtype=b.dtype), b.T @ y)


def check(lab):
    recorder, _ = lab.run([GenerativeKernel(**SMALL)], TASK)
    model, last = deepcopy(recorder.start), None
    for step in recorder.steps:
        current, core = (step.batch[part.rows] for part in step.batch.parts)
        assert lab.rows_of(core) != last, "drawn anew in every step"
        last = lab.rows_of(core)
        assert len(set(last)) == len(core) == SIZE * NUM_CLASSES and set(core.experience_id.tolist()) == {
            step.experience
        }
        scores = SCALE * ridge(model(current).hidden, model(core).hidden, core.targets)
        loss = -scores.log_softmax(1)[range(len(current)), current.targets].mean()
        lab.close(step.terms["generative_kernel"], loss.detach(), rtol=1e-5)
        assert step.terms["cross_entropy"] == 0
        gradients = lab.gradient(model, loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model), rtol=1e-5, atol=1e-6)


def test_the_network_s_steps_are_ridge_regression(lab):
    check(lab)


def test_a_coreset_is_no_larger_than_the_experience(lab):
    """Which is what a step costs beside every micro-batch: 60 for each of 4 classes would be 240 rows of 192."""
    recorder, trainer = lab.run(
        [strategy := GenerativeKernel(**SMALL | {"coreset_size": 60})], TASK, batch_size=8, accumulation=2
    )
    assert {len(step.batch.parts_of(strategy.name)[0]) for step in recorder.steps} == {192}
    assert strategy.cost(trainer.state, 16).forwards == 2 * 192
    # three experiences, made rows aside
    assert trainer.state.spent.forwards == trainer.state.spent.backwards == 3 * (192 + 24 * 192)


def test_a_task_that_comes_back_keeps_its_classes(lab):
    """Half of the classes of the first task again: all of them are still remembered."""
    stream = toy_stream(TASK)
    again = replace(stream.experiences[0], id=3, name="again", classes=(0, 1))
    info = replace(stream.info, num_experiences=4)
    stream = replace(stream, experiences=[*stream.experiences, again], info=info)
    lab.run([strategy := GenerativeKernel(**SMALL)], stream)
    assert strategy.learnt == {task: list(range(NUM_CLASSES)) for task in range(3)}


def test_the_oracle_needs_the_ridge(lab, monkeypatch):
    predict = GenerativeKernel._prediction

    def weaker(self, *arguments):
        self.ridge = RIDGE / 2
        return predict(self, *arguments)

    monkeypatch.setattr(GenerativeKernel, "_prediction", weaker)
    lab.dies(lambda: check(lab))


def made_by_hand(lab, trainer, strategy, task):
    """The coreset of a task from the weights of the VAE alone."""
    vae, form, draws = strategy.generator.old, strategy.generator.form, trainer.state.seeds
    targets = torch.arange(NUM_CLASSES).repeat_interleave(SIZE)
    labels = NUM_CLASSES * task + targets
    noise = torch.randn(len(targets), 4, generator=draws.fresh("generative_kernel", "coreset", task))
    shown = torch.cat([noise + vae.prior_LD[labels], torch.eye(3 * NUM_CLASSES)[labels]], dim=1)
    raw = (form["low"] + (form["high"] - form["low"]) * vae.decoder(shown).sigmoid()).detach().round()
    return raw.view(-1, 1, 8, 8).double() / 127.5 - 1, targets


def test_predictions_are_ridge_regression_on_made_rows(lab):
    _, trainer = lab.run([strategy := GenerativeKernel(**SMALL)], TASK)
    state, model = trainer.state, trainer.state.model
    rows = Batch.cat([state.prepare(e.load().rows(torch.arange(5))) for e in state.stream.experiences])
    found = strategy.eval_forward(state, rows).logits.detach()
    for task in range(3):
        inputs, targets = made_by_hand(lab, trainer, strategy, task)
        blank = torch.zeros_like(targets)
        core = model(Batch(inputs, targets, blank, blank, blank + task)).hidden
        asked = rows.task_id == task
        lab.close(found[asked], ridge(model(rows[asked]).hidden, core, targets).detach(), rtol=1e-5)


def test_a_task_never_seen_is_not_guessed(lab):
    _, trainer = lab.run([strategy := GenerativeKernel(**SMALL)], TASK)
    rows = trainer.state.prepare(trainer.state.stream.experiences[2].load().rows(torch.arange(5)))
    del strategy.learnt[2]
    trainer.state.experience = trainer.state.stream.experiences[1]
    assert strategy.eval_forward(trainer.state, rows).logits.abs().sum() == 0


def cores(lab, stream, **options):
    """Coreset of every task, inside each experience and after it; made rows come from nowhere, -1."""
    strategy, found = GenerativeKernel(**SMALL), []

    class Keeper(lab.Recorder):
        def note(self, state, place):
            found.append((state.experience.id, place, [strategy._coreset(state, task) for task in range(3)]))

        def on_step_end(self, state, batch, output):
            if not found or found[-1][0] != state.experience.id:
                self.note(state, "inside")

        def on_experience_end(self, state):
            self.note(state, "after")

    lab.run([strategy, Keeper()], stream, **options)
    return found


def test_the_running_experience_is_judged_by_its_own_rows(lab):
    """Also one of a task that came back, here with half of its classes; what was learnt before is made."""
    stream = toy_stream(TASK)
    again = replace(stream.experiences[0], id=3, name="again", classes=(0, 1))
    stream = replace(stream, experiences=[*stream.experiences, again], info=replace(stream.info, num_experiences=4))
    found = cores(lab, stream)
    assert [place for _, place, _ in found] == ["inside", "after"] * 4
    for k, place, rows in found:
        for task, core in enumerate(rows):
            if core is None:
                assert task > k
                continue
            own = [] if place == "after" or task != k % 3 else [0, 1] if k == 3 else [0, 1, 2, 3]
            made = sorted({0, 1, 2, 3} - set(own))
            # the data of a task that comes back are called as before
            assert core.experience_id.tolist() == [task] * SIZE * len(own) + [-1] * SIZE * len(made)
            assert core.targets[core.experience_id == -1].tolist() == [c for c in made for _ in range(SIZE)]
            assert set(core.task_id.tolist()) == {task}


def test_classes_that_a_task_brings_when_it_comes_back_are_not_unknown(lab):
    """Learnt before were 0 and 1 only: inside the experience that brings 2 and 3 these have rows."""
    stream = toy_stream(TASK)
    first, again = replace(stream.experiences[0], classes=(0, 1)), replace(stream.experiences[0], id=1, name="again")
    again = replace(again, classes=(2, 3))
    stream = replace(stream, experiences=[first, again], info=replace(stream.info, num_experiences=2))
    inside = next(rows[0] for k, place, rows in cores(lab, stream) if (k, place) == (1, "inside"))
    assert inside.experience_id.tolist() == [0] * 2 * SIZE + [-1] * 2 * SIZE
    assert sorted({*inside[inside.experience_id == -1].targets.tolist()}) == [0, 1]


def test_fourier_features_are_the_gaussian_kernel(lab):
    strategy = GenerativeKernel(**SMALL, kernel="fourier", num_fourier=60000, length=0.7)
    _, trainer = lab.run([GenerativeKernel(**SMALL)], TASK)
    hidden = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    phi = strategy._phi(trainer.state, hidden)
    unit = F.normalize(hidden, dim=1)
    wanted = torch.exp(-torch.cdist(unit, unit).square() / (2 * 0.7**2))
    lab.close(phi @ phi.T, wanted, rtol=0, atol=0.02)


def contrast_by_rows(vectors, labels, temperature):
    z = [v / v.norm() for v in vectors]
    terms = []
    for i, label in enumerate(labels):
        others = [a for a in range(len(z)) if a != i]
        positive = [z[i] @ z[a] / temperature for a in others if labels[a] == label]
        if positive:
            total = torch.stack([z[i] @ z[a] / temperature for a in others]).logsumexp(0)
            terms.append(-sum(p - total for p in positive) / len(positive))
    return sum(terms) / len(terms)


def bound(vae, pixels, noise, labels):
    mean, log_variance = vae.encoder(pixels).chunk(2, 1)
    latent = Normal(mean, (log_variance / 2).exp())
    z = torch.cat([mean + latent.scale * noise, torch.eye(3 * NUM_CLASSES)[labels]], dim=1)
    likelihood = Bernoulli(logits=vae.decoder(z), validate_args=False).log_prob(pixels).sum(1)
    return (kl_divergence(latent, Normal(vae.prior_LD[labels], 1.0)).sum(1) - likelihood).mean(), mean


def check_vae(lab, monkeypatch):
    noises, made, starts = [], [], []
    draw, build, rows = Generator.noise, Generator.prepare, Generator.rows
    monkeypatch.setattr(Generator, "noise", lambda self, *a: noises.append(draw(self, *a)) or noises[-1])

    def built(self, state, num_labels=0):
        is_new = self.vae is None
        build(self, state, num_labels)
        if is_new:
            starts.append(deepcopy(self.vae))

    def noted(self, num_rows, generator, device, labels=None):
        made.append((rows(self, num_rows, generator, device, labels), labels))
        return made[-1][0]

    monkeypatch.setattr(Generator, "prepare", built)
    monkeypatch.setattr(Generator, "rows", noted)
    recorder, trainer = lab.run([GenerativeKernel(**SMALL, contrast=CONTRAST)], TASK, evaluate="seen", eval_rows=1)
    noises_of, made_of = list(noises), list(made)
    # evaluation makes coresets too, each drawing noise once
    kept = [k for k, (_, labels) in enumerate(made_of) if len(labels) == lab.batch_size]
    stored = [e.load() for e in trainer.state.stream.experiences]
    low, high = float(stored[0].inputs.min()), float(stored[0].inputs.max())
    vae = starts[0]
    adam = torch.optim.Adam(vae.parameters(), lr=SMALL["generator_lr"])
    queue = iter([n for n in noises_of if len(n) == lab.batch_size])
    number = iter(kept)
    for step in recorder.steps:
        k, ids = step.experience, step.batch.sample_ids[: step.batch.num_current]
        pieces = [(stored[k].inputs[ids], NUM_CLASSES * k + stored[k].targets[ids], 1 / (k + 1), next(queue))]
        if k:
            raw, labels = made_of[next(number)]
            assert set(labels.tolist()) <= set(range(NUM_CLASSES * k))
            next(queue)  # that of the made rows themselves
            pieces.append((raw, labels, k / (k + 1), next(queue)))
        loss, means, labels = 0.0, [], []
        for raw, label, share, noise in pieces:
            pixels = ((raw.flatten(1).float() - low) / (high - low)).clamp(0, 1)
            value, mean = bound(vae, pixels, noise, label)
            loss, means, labels = loss + share * value, [*means, mean], [*labels, *label.tolist()]
        loss = loss + CONTRAST * contrast_by_rows(torch.cat(means), labels, 0.1)
        adam.zero_grad()
        loss.backward()
        adam.step()
    lab.close(lab.weights(trainer.strategies[0].generator.vae), lab.weights(vae), rtol=5e-3, atol=5e-4)


def test_the_vae_s_steps_are_the_plain_loop(lab, monkeypatch):
    check_vae(lab, monkeypatch)


def test_the_oracle_needs_the_contrast(lab, monkeypatch):
    monkeypatch.setattr(generative_kernel, "supervised_contrastive", lambda means, *_: means.sum() * 0.0)
    lab.dies(lambda: check_vae(lab, monkeypatch))


def test_bad_input_is_refused():
    for name, value in (("coreset_size", 0), ("ridge", 0), ("kernel", "odd"), ("contrast", -1), ("latent", 0)):
        with pytest.raises(UserError, match=rf"generative_kernel\.{name} is {value!r}"):
            GenerativeKernel(**{name: value})
    stream = toy_stream(TASK)
    with pytest.raises(UserError, match="makes rows of given classes, and experience 0"):
        GenerativeKernel().check(replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences]))
