"""What backbones trace of themselves: the time constants of a network, wherever it is measured."""

import math
from functools import partial

import pytest
import torch

from cl.backbones.gpt import Gpt
from cl.config import TrainerConfig
from cl.hooks import Strategy
from cl.tracking import Memory
from cl.trainer import Trainer
from strategies.hypernet import Hypernet
from streams.probes.n_parity import n_parity

LEAKY = "nonlinear_rnn(cell=leaky_tau(shortest=2, longest=8), units=3)"


class Kept(Strategy):
    """Every time constant of the model, in plain numbers, before training and after each step."""

    def __init__(self):
        self.tau = {}

    def on_run_start(self, state):
        self.on_step_end(state, None, None)

    def on_step_end(self, state, batch, output):
        rho = [x for name, p in state.model.named_parameters() if name.endswith("rho") for x in p.tolist()]
        self.tau[state.step] = [1 + math.log1p(math.exp(x)) for x in rho]


def traced(strategy, blocks, setting="domain_incremental", **config):
    memory = Memory(every_steps=1)
    trainer = Trainer(
        n_parity((2, 3), setting, train_rows=16, eval_rows=4),
        partial(Gpt, width=8, num_heads=2, blocks=blocks, mlp="none"),
        [strategy],
        optimizer=partial(torch.optim.Adam, lr=0.1),
        config=TrainerConfig(**({"max_steps": 3, "batch_size": 8, "device": "cpu"} | config)),
        observers=[memory],
    )
    return trainer.run().traces, memory


def test_time_constants_are_traced_wherever_the_model_is_measured():
    kept = Kept()
    other = "nonlinear_rnn(cell=leaky_tau(shortest=3, longest=3), units=1)"
    traces, memory = traced(kept, f"{LEAKY} + {other}", eval_every=2)
    assert kept.tau[0] == pytest.approx([2, 4, 8, 3], rel=1e-6)
    assert kept.tau[6] != pytest.approx(kept.tau[0], rel=1e-4), "nothing was learnt"
    for name, of in (("tau_mean", lambda tau: sum(tau) / 4), ("tau_max", max)):
        curve = [(step, value) for each, step, value in traces if each == name]
        assert [step for step, _ in curve] == [0, 2, 3, 5, 6]
        assert [value for _, value in curve] == pytest.approx([of(kept.tau[step]) for step, _ in curve], rel=1e-6)
        assert memory.curve(f"train/{name}") == curve
    assert len(traces) == 10


def test_networks_without_time_constants_of_their_own_trace_none():
    assert traced(Kept(), "nonlinear_rnn(cell=gru, units=3)")[0] == []
    generated = Hypernet(chunk_size=None, hidden=(), lookahead=False)
    assert traced(generated, LEAKY, "task_incremental")[0] == []
