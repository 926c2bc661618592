"""Linear layers that are held on the side of their inputs: however these lie in memory, and wherever a run stops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.evaluation import evaluating, predict
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies._held_inputs import HeldInputs
from strategies._subspace import Principal
from strategies.gpm import Gpm
from strategies.hebbian import Hebbian
from strategies.lwf import Lwf
from strategies.owm import Owm

DOMAIN = Setting.DOMAIN_INCREMENTAL
SHAPES = {
    "in order": lambda: drawn(6, 4, 5),
    "turned": lambda: drawn(6, 5, 4).transpose(1, 2),
    "time first": lambda: drawn(4, 6, 5).transpose(0, 1),
    "the same at all times": lambda: drawn(6, 1, 5).expand(6, 4, 5),
    "rows turned": lambda: drawn(5, 6).T,
}
ROWS = torch.arange(16)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("by_gradients", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_projected_however_inputs_lie_in_memory(shape, has_bias, by_gradients):
    """theta - 0.1 G (I - U U^T), by hand; what is not projected would lie in the weights as it is."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(5, 3, bias=has_bias, dtype=torch.float64), SHAPES[shape]()
    ones = [drawn(*inputs.shape[:-1], 1) ** 0] * has_bias
    rows = torch.cat([inputs, *ones], dim=-1).flatten(0, -2)
    old = drawn(2, 5 + has_bias)
    subspace = Principal(1.0)
    subspace.update(old)
    subspace.end_task()
    whole = torch.cat([p.detach().view(3, -1) for p in layer.parameters()], dim=1)
    gradient = 2 * (rows @ whole.T).T @ rows
    outside = torch.eye(len(old.T)).double() - old.T @ torch.linalg.inv(old @ old.T) @ old
    expected = whole - 0.1 * gradient @ outside

    held = HeldInputs(layer, subspace, subspace.response(layer), by_gradients)
    layer(inputs).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    answer = layer(inputs).detach()
    assert held.fold() is not by_gradients
    held.detach()
    found = torch.cat([p.detach().view(3, -1) for p in layer.parameters()], dim=1)
    assert torch.allclose(found, expected, rtol=1e-10)
    assert torch.allclose(layer(inputs), answer, rtol=1e-10)


class Stop(Strategy):
    """Asks the run to stop in the middle of its second experience."""

    settings = frozenset(Setting)
    trainer: Trainer

    def on_batch(self, state, batch):
        if state.step == 45:
            self.trainer.request_stop()
        return batch


Stop.name = "stop"


def made(strategies, tmp_path=None, lr=0.005):
    config = TrainerConfig(epochs=2, batch_size=16, device="cpu")
    optimizer = partial(torch.optim.Adam, lr=lr)
    return Trainer(toy_stream(DOMAIN), ToyNet, strategies, optimizer=optimizer, config=config, run_dir=tmp_path)


def answers(trainer):
    state = trainer.state
    with evaluating(state.model):
        return predict(state, trainer.strategies, state.prepare(toy_stream(DOMAIN).eval_sets[0].load().rows(ROWS)))


def test_a_stopped_run_answers_as_it_did_before_anything_is_trained(tmp_path):
    """As `cl evaluate` and `cl export` see it: the weights themselves are not yet those that the layers answer with."""
    stop = Stop()
    run = made([Gpm(thresholds=0.9, num_rows=100), stop], tmp_path)
    stop.trainer = run
    assert run.run().status == "interrupted"
    expected = answers(run).logits
    read = made([Gpm(thresholds=0.9, num_rows=100), Stop()], tmp_path)
    assert read.keeper.restore() == (1, 22)
    torch.testing.assert_close(answers(read).logits, expected, rtol=0, atol=0)
    inputs = read.state.prepare(toy_stream(DOMAIN).eval_sets[0].load().rows(ROWS)).inputs.flatten(1)
    first, head = read.state.model.first, read.state.model.head

    def plain():
        hidden = F.linear(inputs, first.weight, first.bias).relu()
        return F.linear(hidden, head.weight, head.bias)

    assert (plain() - expected).abs().max() > 0.1
    read.strategies[0].settle(read.state)
    torch.testing.assert_close(plain(), expected, rtol=1e-5, atol=1e-5)


def test_lateral_neurons_do_not_learn_what_a_teacher_reads():
    """The teacher of lwf answers the same batch, and is the last one that did."""
    read, learnt = [], []

    class Before(Strategy):
        settings = frozenset(Setting)

        def penalty(self, state, batch, output):
            read.append(output.hidden.detach())

    class Learning(Hebbian):
        def _learn(self, layers):
            learnt.extend(inputs["head"][0] for inputs in self._seen.values())
            super()._learn(layers)

    Learning.name, Before.name = "hebbian", "before"
    made([Before(), Lwf(1.0), Learning(neurons=4, growth=2)]).run()
    assert len(learnt) == 72
    assert all(torch.equal(a, b) for a, b in zip(learnt, read, strict=True))


def test_weights_that_others_set_when_an_experience_begins_are_where_it_starts_from():
    """Without a learning rate they stay there; what the layers said before is not put back."""
    starts, ends = [], []

    class Reset(Strategy):
        settings = frozenset(Setting)

        def on_experience_start(self, state):
            with torch.no_grad():
                for p in state.model.parameters():
                    p.mul_(2)
            starts.append([p.detach().clone() for p in state.model.parameters()])

        def on_experience_end(self, state):
            ends.append([p.detach().clone() for p in state.model.parameters()])

    Reset.name = "reset"
    made([Gpm(thresholds=0.9, num_rows=100), Reset()], lr=0.0).run()
    for start, end in zip(starts, ends, strict=True):
        torch.testing.assert_close(end, start)


def test_two_projections_are_refused():
    with pytest.raises(UserError, match="gpm and owm both hold the weights of every layer"):
        made([Gpm(), Owm()])
