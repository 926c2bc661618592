"""The recurrent generator against torch's LSTM, its exactness under growth, and the regulariser by a plain loop."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cl.core import Setting, UserError
from cl.testing import toy_stream
from strategies._hypernet_chunks import ChunkGenerator
from strategies._hypernet_recurrent import RecurrentGenerator
from strategies._hypernet_strategy import Generating
from strategies.rnn_hypernet import RnnHypernet

ADAM = partial(torch.optim.Adam, lr=0.01)
OPTIONS = {"chunk_size": 300, "units": 6, "embedding": 5, "chunk_embedding": 3, "beta": 0.5, "start": "xavier"}
DOMAIN = Setting.DOMAIN_INCREMENTAL


def made(sizes=(7,), gated=0, num_numbers=95):
    torch.manual_seed(0)
    return RecurrentGenerator(num_numbers, 4, 3, sizes, chunk_size=20, gated=gated).double()


def embeddings(num=3):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(1)).double()


def by_lstm(generator, embeddings_TE):
    """The same weights in `nn.LSTM`, whose gates come in the same order; the open forget gate is in the bias."""
    units = generator.active
    lstm = nn.LSTM(7, units, batch_first=True).double()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(generator.inputs_4HD[:, :units].flatten(0, 1))
        lstm.weight_hh_l0.copy_(generator.recurrent_4HH[:, :units, :units].flatten(0, 1))
        bias = generator.bias_4H[:, :units].clone()
        bias[1] += 1
        lstm.bias_ih_l0.copy_(bias.flatten())
        lstm.bias_hh_l0.zero_()
    chunks = generator.chunks_KE
    inputs = torch.stack([torch.cat([e.expand(len(chunks), -1), chunks], dim=1) for e in embeddings_TE])
    hidden = lstm(inputs)[0]
    steps = hidden @ generator.last.weight[:, :units].T + generator.last.bias
    return steps.flatten(1)[:, : generator.num_numbers]


@pytest.mark.parametrize("num_growths", [0, 2])
def test_the_recurrence_is_an_lstm(num_growths):
    generator = made(sizes=(4, 6, 9))
    for _ in range(num_growths):
        generator.grow()
        nn.init.normal_(generator.last.weight)
        nn.init.normal_(generator.recurrent_4HH)
    torch.testing.assert_close(generator(embeddings()), by_lstm(generator, embeddings()))


def test_growth_changes_nothing_that_was_generated():
    generator = made(sizes=(4, 6, 9))
    before = generator(embeddings()).detach()
    for units in (6, 9, 9):
        generator.grow()
        assert generator.active == units
        torch.testing.assert_close(generator(embeddings()).detach(), before, rtol=0, atol=1e-6)
    # and what has grown takes part from the next step on
    generator(embeddings()).square().sum().backward()
    assert generator.last.weight.grad[:, 4:].abs().min() > 0


def test_the_oracle_of_growth_needs_the_zero_blocks(lab, monkeypatch):
    def careless(self):
        self.growths += 1

    monkeypatch.setattr(RecurrentGenerator, "grow", careless)
    with pytest.raises(AssertionError):
        test_growth_changes_nothing_that_was_generated()


def shuffled(generator):
    """Numbers that are generated when the steps come in another order, put back in order."""
    order = torch.tensor([2, 0, 3, 1, 4])
    kept = generator.chunks_KE.detach().clone()
    with torch.no_grad():
        generator.chunks_KE.copy_(kept[order])
        generator.num_numbers = 100
        found = generator(embeddings()).view(3, 5, 20)[:, order.argsort()].flatten(1)
        generator.chunks_KE.copy_(kept)
        return found, generator(embeddings())


def test_the_order_of_steps_matters_to_the_recurrent_generator_only():
    found, wanted = shuffled(made(num_numbers=100))
    assert (found - wanted).abs().max() > 1e-3
    torch.manual_seed(0)
    chunked = ChunkGenerator(100, 4, 3, (7,), 20, "relu", True).double()
    torch.testing.assert_close(*shuffled(chunked))


def test_a_gated_condition_does_not_hear_new_units():
    generator = made(sizes=(4, 9), gated=3)
    generator.assign(0)
    before = generator(embeddings(), (0, 1, 2)).detach()
    generator.grow()
    nn.init.normal_(generator.recurrent_4HH.data[:, :, 4:])
    nn.init.normal_(generator.last.weight.data[:, 4:])
    after = generator(embeddings(), (0, 1, 2)).detach()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-12)
    assert (after[1] - before[1]).abs().max() > 1e-3
    # conditions asked in another order, as a batch of old ones does
    torch.testing.assert_close(generator(embeddings()[[2, 0]], (2, 0)), after[[2, 0]])


# the strategy


def check_frozen(lab, **options):
    """Old tasks are not forgotten at all: what was generated at the end of an experience is generated ever after."""
    strategy = RnnHypernet(**(OPTIONS | {"growth": 3, "freezes": True} | options))
    adam = partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)
    recorder, _ = lab.run([strategy], DOMAIN, optimizer=adam)
    assert [net.generator.active for net in recorder.ends] == [6, 9, 12]
    for j, net in enumerate(recorder.ends):
        for later in recorder.ends[j:]:
            lab.close(later.generated([j]).detach(), net.generated([j]).detach(), rtol=0, atol=1e-13)
    pairs = zip(recorder.start.embeddings, recorder.ends[-1].embeddings, strict=True)
    assert all((a - b).abs().max() > 0 for a, b in pairs)
    assert not strategy.kept


def test_frozen_growth_forgets_nothing(lab):
    check_frozen(lab)


def test_the_oracle_needs_the_freeze(lab, monkeypatch):
    monkeypatch.setattr(RnnHypernet, "held", lambda *_: [])
    lab.dies(lambda: check_frozen(lab))


def test_targets_are_taken_and_growth_starts_from_them(lab):
    strategy = RnnHypernet(**(OPTIONS | {"growth": 3}))
    recorder, _ = lab.run([strategy], DOMAIN, optimizer=ADAM)
    assert [net.generator.active for net in recorder.ends] == [6, 9, 12]
    with torch.no_grad():
        lab.close(strategy.kept["numbers"], recorder.ends[1].generated([0, 1]))
    sizes = [net.num_generator for net in recorder.ends]
    # 4 gates of 3 new units and a column of V for each: units listen to inputs, a bias and each other
    num_chunks, num_numbers = 3, 300
    wanted = [num_chunks * 3 + 4 * h * (8 + h + 1) + num_numbers * (h + 1) + 3 * 5 for h in (6, 9, 12)]
    assert sizes == wanted


def test_units_that_are_not_in_use_yet_stay_as_they_were_drawn(lab):
    """Weight decay alone would take all of them to nothing in Adam, which divides it by its own size."""
    adam = partial(torch.optim.Adam, lr=0.01, weight_decay=0.1)
    recorder, _ = lab.run([RnnHypernet(**(OPTIONS | {"growth": 3}))], DOMAIN, optimizer=adam)
    drawn = recorder.start.generator
    for net, active in zip(recorder.ends, (6, 9, 12), strict=True):
        for name in ("inputs_4HD", "recurrent_4HH", "bias_4H"):
            assert torch.equal(getattr(net.generator, name)[:, active:], getattr(drawn, name)[:, active:])
        assert not torch.equal(net.generator.inputs_4HD[:, :active], drawn.inputs_4HD[:, :active])


def test_the_penalty_pulls_old_weights_back(lab):
    """The gradient that is added is that of the plain formula, at the place that plain Adam would go to."""
    gradients = []

    class Watched(RnnHypernet):
        name = "rnn_hypernet"

        def on_gradients(self, state):
            net = self.net(state.model)
            named = dict(net.generator.named_parameters())
            before = {n: p.grad.clone() for n, p in named.items()}
            super().on_gradients(state)
            if not self.kept:
                return
            clones = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
            adam = ADAM(list(clones.values()))
            for (n, p), c in zip(named.items(), clones.values(), strict=True):
                c.grad = before[n].clone()
                adam.state[c] = {k: v.clone() for k, v in state.optimizer.state[p].items()}
            adam.step()
            at = torch.stack([net.embeddings[c].detach() for c in self.old])
            numbers = torch.func.functional_call(net.generator, clones, (at,))
            pull = 0.5 * (numbers - self.kept["numbers"]).square().sum(1).mean()
            for n, g in zip(named, torch.autograd.grad(pull, list(clones.values())), strict=True):
                lab.close(named[n].grad - before[n], g, rtol=1e-6, atol=1e-8)
                gradients.append(g.abs().max().item())

    lab.run([Watched(**OPTIONS)], DOMAIN, optimizer=ADAM)
    assert max(gradients) > 1e-4


def test_the_pull_goes_through_the_shared_machinery():
    assert RnnHypernet.pull is Generating.pull


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"units": 0}, r"rnn_hypernet\.units is 0; it must be an integer of at least 1"),
        ({"chunk_size": None}, r"rnn_hypernet\.chunk_size is None; it must be an integer of at least 1"),
        ({"growth": -1}, r"rnn_hypernet\.growth is -1; it must be an integer of at least 0"),
        ({"freezes": True}, r"rnn_hypernet\.freezes is True; it must be false unless rnn_hypernet\.growth is above 0"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(UserError, match=sentence):
        RnnHypernet(**options)


def test_a_revisited_domain_neither_grows_nor_moves_the_others(lab):
    stream = toy_stream(DOMAIN, num_experiences=2)
    again = replace(stream, experiences=[*stream.experiences, replace(stream.experiences[0], id=2)])
    again = replace(again, info=replace(stream.info, num_experiences=3))
    strategy = RnnHypernet(**(OPTIONS | {"growth": 3, "freezes": True}))
    recorder, _ = lab.run([strategy], again, optimizer=ADAM)
    assert [net.generator.active for net in recorder.ends] == [6, 9, 9]
    with torch.no_grad():
        lab.close(recorder.ends[2].generated([1]), recorder.ends[1].generated([1]), rtol=0, atol=1e-13)
