"""Generative replay against a plain loop: the network's steps, and the autoencoder's by torch.distributions."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from cl.core import Setting, TensorData, UserError
from cl.testing import toy_stream
from strategies._vae import Generator, Vae
from strategies.generative_replay import GenerativeReplay

CLASS, TASK, DOMAIN = Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL, Setting.DOMAIN_INCREMENTAL
SIZE, WEIGHT, TEMPERATURE = 12, 0.7, 2.0
SMALL = {"hidden": 20, "latent": 4, "generator_lr": 0.01}


def network_loss(model, teacher, batch, labels, k, share, old):
    current, made = (batch[part.rows] for part in batch.parts)
    new, answers = model(made).logits, teacher(made).logits.detach()
    heads = [0] * len(made) if made.task_id is None else made.task_id.tolist()
    terms = []
    for row, head in enumerate(heads):
        columns = old[head]
        said = answers[row, columns]
        if labels == "hard":
            assert made.targets[row] == columns[int(said.argmax())]
            terms.append(-new[row].log_softmax(0)[made.targets[row]])
        else:
            p = (said / TEMPERATURE).softmax(0)
            q = (new[row] / TEMPERATURE).softmax(0)
            terms.append(-(TEMPERATURE**2) * (p * q[columns].log()).sum())
    loss = -model(current).logits.log_softmax(1)[range(len(current)), current.targets].mean()
    return share[0] * loss + WEIGHT * share[1] * sum(terms) / len(terms)


def old_outputs(setting, k):
    if setting == CLASS:
        return {0: list(range(2 * k))}
    return {head: list(range(4)) for head in (range(k) if setting == TASK else range(1))}


def check(lab, setting=CLASS, labels="hard", weighting="experience"):
    strategy = GenerativeReplay(SIZE, WEIGHT, labels, weighting, TEMPERATURE, **SMALL)
    recorder, _ = lab.run([strategy], setting)
    model = deepcopy(recorder.start)
    for step in recorder.steps:
        k = step.experience
        if k == 0:
            assert len(step.batch.parts) == 1
            loss = lab.label_loss(model, step.batch)
        else:
            share = (1 / (k + 1), k / (k + 1)) if weighting == "experience" else (1.0, 1.0)
            teacher = deepcopy(recorder.ends[k - 1]).eval()
            loss = network_loss(model, teacher, step.batch, labels, k, share, old_outputs(setting, k))
            assert len(step.batch.parts[1]) == SIZE
        gradients = lab.gradient(model, loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["experience", "equal"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("setting", [CLASS, TASK, DOMAIN])
def test_the_network_s_steps_are_the_plain_loop(lab, setting, labels, weighting):
    check(lab, setting, labels, weighting)


def bound(vae, pixels, noise):
    """Negative evidence bound of each row, from torch's distributions."""
    mean, log_variance = vae.encoder(pixels).chunk(2, 1)
    latent = Normal(mean, (log_variance / 2).exp())
    z = mean + latent.scale * noise
    likelihood = Bernoulli(logits=vae.decoder(z), validate_args=False).log_prob(pixels).sum(1)
    return kl_divergence(latent, Normal(torch.zeros_like(mean), 1.0)).sum(1) - likelihood


def check_generator(lab, monkeypatch):
    """The autoencoder after the run is an independent Adam on the rows that were shown, with the recorded noise."""
    noises, starts = [], []
    draw, build = Generator.noise, Generator.prepare

    def noted(self, *args):
        noises.append(draw(self, *args))
        return noises[-1]

    def built(self, state, num_labels=0):
        build(self, state, num_labels)
        starts.append(deepcopy(self.vae))

    monkeypatch.setattr(Generator, "noise", noted)
    monkeypatch.setattr(Generator, "prepare", built)
    recorder, trainer = lab.run([GenerativeReplay(SIZE, WEIGHT, "hard", "experience", TEMPERATURE, **SMALL)], CLASS)
    rows = [e.load().inputs for e in trainer.state.stream.experiences]
    low, high = float(rows[0].min()), float(rows[0].max())
    vae, old = starts[0], None
    adam = torch.optim.Adam(vae.parameters(), lr=SMALL["generator_lr"])
    queue = iter(noises)
    for number, step in enumerate(recorder.steps):
        k = step.experience
        if k and recorder.steps[number - 1].experience == k - 1:
            old = deepcopy(vae)
        made = None
        if k:
            probability = old.decoder(next(queue)).sigmoid().detach()
            made = (low + (high - low) * probability).round()
            shown = step.batch[step.batch.parts[1].rows].inputs.flatten(1)
            lab.close(shown, made.double() / 127.5 - 1.0)
        current = rows[k][step.batch.sample_ids[: step.batch.num_current]].flatten(1).float()
        pieces = [(current, 1 / (k + 1))] + ([(made, k / (k + 1))] if k else [])
        loss = sum(
            share * bound(vae, ((raw - low) / (high - low)).clamp(0, 1), next(queue)).mean() for raw, share in pieces
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = trainer.strategies[0].generator.vae
    lab.close(lab.weights(found), lab.weights(vae), rtol=1e-3, atol=1e-4)
    assert next(queue, None) is None


def test_the_autoencoder_s_steps_are_the_plain_loop(lab, monkeypatch):
    check_generator(lab, monkeypatch)


def test_the_oracle_needs_the_made_rows_in_the_autoencoder_s_loss(lab, monkeypatch):
    step_end = GenerativeReplay.on_step_end

    def forgets(self, state, batch, output):
        self._made = None
        step_end(self, state, batch, output)

    monkeypatch.setattr(GenerativeReplay, "on_step_end", forgets)
    with pytest.raises((AssertionError, StopIteration, RuntimeError)):
        check_generator(lab, monkeypatch)


def test_the_oracle_needs_the_answers_of_the_last_model(lab, monkeypatch):
    monkeypatch.setattr(GenerativeReplay, "_old_answers", lambda self, state, rows: torch.eye(6)[[0] * len(rows)])
    lab.dies(lambda: check(lab))


def test_the_bound_by_hand():
    """One pixel of 1, z = 0 whatever the row: BCE log 2, KL of N(1, e) to N(3, 1) = (4 + e - 1 - 1) / 2."""
    vae = Vae(1, 1, 1, num_labels=2).double()
    for p in vae.parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        vae.encoder[2].bias.copy_(torch.tensor([1.0, 1.0]))
        vae.prior_LD.copy_(torch.tensor([[0.0], [3.0]]))
    loss, mean = vae.loss(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(2) + (math.e + 2) / 2)
    assert mean.item() == 1


def test_the_decoder_reads_the_label():
    vae = Vae(3, 8, 2, num_labels=2)
    z = torch.zeros(1, 2)
    assert not torch.equal(vae.decode(z, torch.tensor([0])), vae.decode(z, torch.tensor([1])))


def test_made_rows_have_the_form_of_stored_ones(lab):
    _, trainer = lab.run([strategy := GenerativeReplay(**SMALL)], CLASS)
    raw = strategy.generator.rows(5, torch.Generator(), torch.device("cpu"))
    stored = trainer.state.stream.experiences[0].load().inputs
    assert raw.shape[1:] == stored.shape[1:] and raw.dtype == stored.dtype
    assert stored.min() <= raw.min() and raw.max() <= stored.max()


def test_rows_of_floats_stay_floats(lab):
    stream = toy_stream(CLASS)

    def floats(load):
        data = load()
        return TensorData(data.inputs / 50 - 6, data.targets, data.experience_id)

    experiences = [replace(e, load=lambda load=e.load: floats(load)) for e in stream.experiences]
    recorder, _ = lab.run([strategy := GenerativeReplay(**SMALL)], replace(stream, experiences=experiences))
    raw = strategy.generator.rows(5, torch.Generator(), torch.device("cpu"))
    assert raw.is_floating_point() and raw.min() < 0
    assert recorder.steps[-1].experience == 2


@pytest.mark.parametrize(("dtype", "factor", "shift"), [(torch.int16, 100, -6000), (torch.int64, 300, 0)], ids=str)
def test_integers_that_are_no_bytes_stay_what_they_are(lab, dtype, factor, shift):
    """Bytes would wrap around: -6,000 is 144 there."""
    stream = toy_stream(CLASS)

    def wide(load):
        data = load()
        return TensorData(data.inputs.to(dtype) * factor + shift, data.targets, data.experience_id)

    experiences = [replace(e, load=lambda load=e.load: wide(load)) for e in stream.experiences]
    _, trainer = lab.run([strategy := GenerativeReplay(**SMALL)], replace(stream, experiences=experiences))
    generator, stored = strategy.generator, trainer.state.stream.experiences[0].load().inputs
    raw = generator.rows(5, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert raw.dtype == dtype and stored.min() <= raw.min() and raw.max() <= stored.max()
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    low, high = float(stored.min()), float(stored.max())
    wanted = low + (high - low) * generator.old.decoder(noise).sigmoid().detach()
    assert (raw.flatten(1) - wanted).abs().max() <= 0.51


def test_bad_arguments_are_refused():
    for name, value in (("labels", "firm"), ("weighting", "odd"), ("hidden", 0), ("generator_lr", 0), ("weight", -1)):
        with pytest.raises(UserError, match=rf"generative_replay\.{name} is {value!r}"):
            GenerativeReplay(**{name: value})
    stream = toy_stream(CLASS)
    with pytest.raises(UserError, match="asks the last model for old classes, and experience 0"):
        GenerativeReplay().check(replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences]))
