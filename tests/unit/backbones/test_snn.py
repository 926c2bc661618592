"""The spiking backbone against membranes and gradients written out step by step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from cl.backbones.snn import Snn, SpikingLinear, integrate_and_fire, traces
from cl.config import TrainerConfig
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.testing import toy_stream
from cl.trainer import Trainer
from strategies._layer_inputs import input_rows
from strategies.ewc import Ewc
from strategies.gpm import Gpm
from strategies.hebbian import Hebbian

INFO = StreamInfo("test", Setting.CLASS_INCREMENTAL, (1, 2, 3), 3, 1)
DECAY, THRESHOLD, SLOPE, STEPS = 0.5, 1.0, 4.0, 5


def batch(num_rows=4):
    ids = torch.arange(num_rows)
    inputs = torch.randn(num_rows, *INFO.input_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(2 * inputs, ids % 3, ids, ids)


def network(**options):
    torch.manual_seed(0)
    return Snn(INFO, **({"hidden": [5, 4], "num_steps": STEPS} | options)).double()


def by_hand(model, rows):
    """Rates, gradient of the first layer's weights under each rule for L = sum of rates, unit by unit, row by row."""
    first, second = model.layers
    width = {"in": 6, "one": 5, "two": 4}
    gradients = {"bptt": torch.zeros_like(first.weight), "ottt": torch.zeros_like(first.weight)}
    second_ottt = torch.zeros_like(second.weight)
    rates = torch.zeros(len(rows), width["two"], dtype=torch.float64)
    for row, pixels in enumerate(rows.inputs.flatten(1)):
        u1, s1 = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        u2, s2 = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        memory, trace = 0.0, torch.zeros(5, dtype=torch.float64)
        # by forward differentiation: du / dW of the first layer, as (units, out, in)
        du1 = torch.zeros(5, 5, 6, dtype=torch.float64)
        ds1, du2, ds2 = torch.zeros_like(du1), torch.zeros(4, 5, 6, dtype=torch.float64), 0.0
        for _ in range(STEPS):
            u1 = DECAY * (u1 - THRESHOLD * s1) + first.weight.detach() @ pixels + first.bias.detach()
            own = torch.zeros(5, 5, 6, dtype=torch.float64)
            for unit in range(5):
                own[unit, unit] = pixels
            du1 = DECAY * (du1 - THRESHOLD * ds1) + own
            s1 = (u1 >= THRESHOLD).double()
            slope1 = surrogate(u1)
            ds1 = slope1[:, None, None] * du1
            u2 = DECAY * (u2 - THRESHOLD * s2) + second.weight.detach() @ s1 + second.bias.detach()
            du2 = DECAY * (du2 - THRESHOLD * ds2) + torch.einsum("ij,jkl->ikl", second.weight.detach(), ds1)
            s2 = (u2 >= THRESHOLD).double()
            slope2 = surrogate(u2)
            ds2 = slope2[:, None, None] * du2
            gradients["bptt"] += ds2.sum(0) / STEPS
            memory, trace = DECAY * memory + 1.0, DECAY * trace + s1
            delta2 = slope2 / STEPS
            gradients["ottt"] += torch.outer((second.weight.detach().T @ delta2) * slope1, memory * pixels)
            second_ottt += torch.outer(delta2, trace)
            rates[row] += s2 / STEPS
    return rates, gradients, second_ottt


def surrogate(membrane):
    sigmoid = torch.sigmoid(SLOPE * (membrane - THRESHOLD))
    return SLOPE * sigmoid * (1 - sigmoid)


@pytest.mark.parametrize("rule", ["bptt", "ottt"])
def test_rates_and_gradients_are_those_written_out(rule):
    model, rows = network(rule=rule), batch()
    rates, gradients, second_ottt = by_hand(model, rows)
    output = model(rows)
    torch.testing.assert_close(output.hidden.detach(), rates, rtol=0, atol=1e-12)
    assert 0 < float(rates.mean()) < 1
    output.hidden.sum().backward()
    torch.testing.assert_close(model.layers[0].weight.grad, gradients[rule])
    assert not torch.allclose(gradients["bptt"], gradients["ottt"])
    if rule == "ottt":
        torch.testing.assert_close(model.layers[1].weight.grad, second_ottt)


def test_without_memory_both_rules_are_one():
    """Where nothing is carried from step to step there is no time to go back through."""
    found = []
    for rule in ("bptt", "ottt"):
        model = network(rule=rule, decay=0.0)
        model(batch()).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted)


def test_the_bias_is_the_weight_of_a_constant_input():
    plain, wider = network(rule="ottt", hidden=[4]), network(rule="ottt", hidden=[4])
    plain(batch()).hidden.square().sum().backward()
    layer = SpikingLinear(7, 4, STEPS, DECAY, is_online=True).double()
    inputs = torch.cat([batch().inputs.flatten(1), torch.ones(4, 1, dtype=torch.float64)], dim=1).unsqueeze(1)
    old = wider.layers[0]
    with torch.no_grad():
        layer.weight.copy_(torch.cat([old.weight, old.bias[:, None]], dim=1))
    wider.fire(layer(inputs)).mean(1).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad[:, -1], plain.layers[0].bias.grad)


def test_bias_false_leaves_out_every_bias():
    for rule in ("bptt", "ottt"):
        model = network(rule=rule, bias=False)
        model(batch()).logits.sum().backward()
        assert [name for name, _ in model.named_parameters()] == ["head.weight", "layers.0.weight", "layers.1.weight"]


def test_spikes_are_zeros_and_ones_and_lose_the_threshold():
    spikes = integrate_and_fire(torch.full((1, 6, 1), 1.2), DECAY, THRESHOLD, SLOPE)
    # 1.2 fires, leaves 0.2; 0.1 + 1.2 fires, leaves 0.3; and so on
    assert spikes.flatten().tolist() == [1.0] * 6
    spikes = integrate_and_fire(torch.full((1, 6, 1), 0.6), DECAY, THRESHOLD, SLOPE)
    # 0.6, 0.9, 1.05 fires; 0.025 + 0.6, 0.9125, 1.05625 fires
    assert spikes.flatten().tolist() == [0, 0, 1, 0, 0, 1]


def test_every_spike_is_a_combination_of_traces():
    """What is held on the traces that strategies read is held on spikes, the bias included."""
    spikes = (torch.rand(2, STEPS, 6, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    layer = SpikingLinear(6, 3, STEPS, DECAY, is_online=False).double()
    rows = input_rows(layer, spikes).view(2, STEPS, 7)
    assert torch.equal(rows[..., -1], torch.ones(2, STEPS, dtype=torch.float64))
    memory = traces(torch.ones(1, STEPS, 1, dtype=torch.float64), DECAY).flatten()
    for t in range(1, STEPS):
        back = memory[t] * rows[:, t] - DECAY * memory[t - 1] * rows[:, t - 1]
        torch.testing.assert_close(back, torch.cat([spikes[:, t], torch.ones(2, 1, dtype=torch.float64)], dim=1))


@pytest.mark.parametrize("rule", ["bptt", "ottt"])
@pytest.mark.parametrize("make", [lambda: Gpm(thresholds=0.9), lambda: Hebbian(neurons=0.3, growth=0.1, rates=0.05)])
def test_projection_on_traces_keeps_responses(rule, make):
    """Currents of the directions held stay; and the network learns."""
    kept = []

    def note(state):
        layers = dict(strategy.layers(state))
        kept.append({name: (strategy.subspaces[name].basis, whole(layer)) for name, layer in layers.items()})

    def whole(layer):
        return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().clone()

    strategy = make()
    ended = strategy.on_experience_end
    strategy.on_experience_end = lambda state: (ended(state), note(state))
    config = TrainerConfig(epochs=3, batch_size=16, device="cpu")
    optimizer = partial(torch.optim.Adam, lr=0.005)
    backbone = partial(Snn, hidden=[32, 32], num_steps=4, rule=rule)
    trainer = Trainer(toy_stream(Setting.DOMAIN_INCREMENTAL), backbone, [strategy], optimizer=optimizer, config=config)
    result = trainer.run()
    assert result.R[0][0] > 0.8
    for early, late in ((0, 1), (0, 2), (1, 2)):
        for name, (basis, then) in kept[early].items():
            assert float(((kept[late][name][1] - then) @ basis).abs().max()) < 1e-5


def test_other_strategies_can_take_gradients_of_single_rows():
    config = TrainerConfig(epochs=1, batch_size=16, device="cpu")
    stream = replace(toy_stream(Setting.DOMAIN_INCREMENTAL))
    backbone = partial(Snn, hidden=[8], num_steps=3, rule="ottt")
    optimizer = partial(torch.optim.SGD, lr=0.1)
    result = Trainer(stream, backbone, [Ewc(importance_rows=20)], optimizer=optimizer, config=config).run()
    assert result.status == "done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": []}, r"backbone.hidden is \[\]"),
        ({"rule": "stdp"}, r"backbone.rule is 'stdp'; it must be one of bptt, ottt"),
        ({"decay": 1.0}, r"backbone.decay is 1.0; it must be at least 0 and below 1"),
        ({"threshold": 0}, r"backbone.threshold is 0; it must be above 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        network(**options)
