"""HyperInterval: bounds from embeddings to logits, the loss by hand, boxes and schedules, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cl.backbones.convnet import Convnet
from cl.backbones.mlp import Mlp
from cl.backbones.recurrent import Recurrent
from cl.backbones.resnet18 import Resnet18
from cl.core import Batch, Output, Setting, UserError
from cl.testing import ToyNet, toy_stream
from strategies._hypernet_interval import worst_case
from strategies._interval import Interval, ends
from strategies.hyper_interval import HyperInterval

ADAM = partial(torch.optim.Adam, lr=0.01)
OPTIONS = {"epsilon": 0.4, "hidden": (10,), "chunk_size": None, "embedding": 5, "beta": 0.5, "start": "xavier"}
CLASS, DOMAIN, TASK = Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL


# the network


def wrapped(backbone, setting=TASK, **options):
    strategy = HyperInterval(**(OPTIONS | options))
    stream = toy_stream(setting)
    strategy.plan(stream)
    torch.manual_seed(0)
    return strategy.wrap(backbone(stream.info), stream.info).double()


def rows(num=4, task=0, seed=0):
    zeros = torch.zeros(num, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(num, 1, 8, 8, generator=generator).double(), zeros, zeros, zeros, zeros + task)


NETWORKS = [Mlp, partial(Convnet, channels=(3, 4), hidden=9), partial(Resnet18, width=2)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("backbone", NETWORKS)
def test_no_embedding_inside_the_box_leaves_the_bounds(backbone, nested):
    """From the box of embeddings to bounds of weights and of logits."""
    net, batch = wrapped(backbone, nested=nested, epsilon=0.2), rows(task=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        low, up = ends(net.boxes([1])[0])
        n_low, n_up = ends(net.bounds([1])[0])
        z_low, z_up = ends(net.bounded(batch, 1.0).logits)
        net.eval()
        for _ in range(100):
            share = torch.rand(low.shape, generator=generator).double()
            numbers = net.generator((low + share * (up - low))[None])[0]
            assert (n_low - 1e-9 <= numbers).all()
            assert (numbers <= n_up + 1e-9).all()
            logits = net.call(numbers, batch, 1).logits
            slack = 1e-9 * (1 + z_up.abs())
            assert (z_low - slack <= logits).all()
            assert (logits <= z_up + slack).all()


@pytest.mark.parametrize("backbone", NETWORKS)
def test_boxes_of_no_size_are_points(backbone):
    net, batch = wrapped(backbone).eval(), rows(task=2)
    low, up = ends(net.bounded(batch, 0.0).logits)
    torch.testing.assert_close(low, up)
    torch.testing.assert_close(low, net(batch).logits)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=15, max_size=15), st.floats(0.01, 20))
def test_nested_boxes_always_meet(numbers, epsilon):
    net = wrapped(ToyNet, epsilon=epsilon)
    with torch.no_grad():
        for e, values in zip(net.embeddings, torch.tensor(numbers).split(5), strict=True):
            e.copy_(values)
        net.seen[:] = True
        low, up = net.intersection()
        assert (low <= -epsilon / 10 + 1e-9).all()
        assert (up >= epsilon / 10 - 1e-9).all()
        every_low, every_up = ends(net.boxes([0, 1, 2]))
        middle = (low + up) / 2
        assert (every_low <= middle).all()
        assert (middle <= every_up).all()


def test_free_boxes_learn_their_radii():
    net = wrapped(ToyNet, nested=False)
    radii = net.radii([0, 1, 2])
    torch.testing.assert_close(radii, torch.full((3, 5), 0.4 / 5).double())
    with torch.no_grad():
        net.widths[1][0] = 100.0
    torch.testing.assert_close(net.radii([1], share=0.5)[0], torch.tensor([0.2, 0, 0, 0, 0]).double())
    ends(net.bounded(rows(task=2), 1.0).logits)[1].sum().backward()
    assert net.widths[2].grad.abs().sum() > 0
    assert net.widths[0].grad is None


# the loss


def box_of_numbers(p, condition, share):
    """Centre and radius, layer by layer: nested box -> linear, ReLU, linear."""
    centre = 0.4 / 10 * p[f"embeddings.{condition}"].cos()
    radius = torch.full_like(centre, share * 0.4 / 5)
    middle = centre
    for layer in ("body.0", "last"):
        weight, bias = p[f"generator.{layer}.weight"], p[f"generator.{layer}.bias"]
        centre, radius, middle = weight @ centre + bias, weight.abs() @ radius, weight @ middle + bias
        if layer == "body.0":
            low, up, middle = (centre - radius).relu(), (centre + radius).relu(), middle.relu()
            centre, radius = (low + up) / 2, (up - low) / 2
    return centre - radius, middle, centre + radius


def parts(theta, num_outputs):
    head, head_bias, first, bias = theta.split([num_outputs * 12, num_outputs, 12 * 64, 12])
    return head.view(num_outputs, 12), head_bias, first.view(12, 64), bias


def worst_logits(low, up, x, targets, num_outputs):
    """ToyNet on boxes: inputs may be negative, hidden units may not."""
    (v_low, c_low, w_low, b_low), (v_up, c_up, w_up, b_up) = parts(low, num_outputs), parts(up, num_outputs)
    products = torch.stack([x[:, None] * w_low, x[:, None] * w_up])
    h_low, h_up = (products.amin(0).sum(-1) + b_low).relu(), (products.amax(0).sum(-1) + b_up).relu()
    products = torch.stack([h[:, None] * v for h in (h_low, h_up) for v in (v_low, v_up)])
    z_low, z_up = products.amin(0).sum(-1) + c_low, products.amax(0).sum(-1) + c_up
    is_right = torch.arange(num_outputs) == targets[:, None]
    return torch.where(is_right, z_low, z_up)


def check_loss(lab, **options):
    strategy = HyperInterval(**(OPTIONS | {"kappa": 0.25} | options))
    recorder, _ = lab.run([strategy], DOMAIN, optimizer=ADAM)
    targets = {}
    for number, step in enumerate(recorder.steps):
        p, within = step.before, number % 12
        share = min(1.0, within / 6)
        kappa = 1 - 0.75 * share
        if within == 0:
            targets = {j: box_of_numbers(p, j, 1.0) for j in range(step.experience)}
        low, middle, up = box_of_numbers(p, step.experience, share)
        x, y = step.batch.inputs.flatten(1), step.batch.targets
        v, c, w, b = parts(middle, 4)
        lab.close(step.terms["cross_entropy"], kappa * F.cross_entropy((x @ w.T + b).relu() @ v.T + c, y))
        wanted = (1 - kappa) * F.cross_entropy(worst_logits(low, up, x, y, 4), y)
        if targets:
            pulls = [
                sum((new - old).square().sum() for new, old in zip(box_of_numbers(p, j, 1.0), ends_j, strict=True)) / 3
                for j, ends_j in targets.items()
            ]
            wanted = wanted + 0.5 * sum(pulls) / len(pulls)
        lab.close(step.terms.get("hyper_interval", 0.0), wanted, rtol=1e-5)
    return recorder


def test_the_loss_is_the_formula(lab):
    check_loss(lab)


@pytest.mark.parametrize("options", [{"ramp": 1.0}, {"beta": 0.0}, {"epsilon": 0.3}, {"kappa": 0.5}])
def test_the_oracle_needs_every_term(lab, options):
    lab.dies(lambda: check_loss(lab, **options))


def test_a_copy_of_the_generator_remembers_the_same_boxes(lab):
    runs = [
        lab.run([HyperInterval(**(OPTIONS | {"targets": targets}))], DOMAIN, optimizer=ADAM)[0]
        for targets in ("weights", "generator")
    ]
    found, wanted = (
        [step.terms["hyper_interval"] for step in run.steps if step.terms.get("hyper_interval")] for run in runs
    )
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("logit_mask", ["none", "batch"])
def test_the_worst_case_of_boxes_of_no_size_is_the_plain_case(lab, logit_mask):
    """Whatever the label loss leaves out, kappa then makes no difference."""
    options = OPTIONS | {"nested": False, "epsilon": 0.0, "ramp": 0.0}
    runs = [
        lab.run([HyperInterval(**(options | {"kappa": kappa}))], Setting.CLASS_INCREMENTAL, logit_mask=logit_mask)[0]
        for kappa in (1.0, 0.25)
    ]
    for plain, mixed in zip(*(recorder.steps for recorder in runs), strict=True):
        lab.close(mixed.after, plain.after, rtol=1e-7, atol=1e-9)


def test_published_schedule_of_kappa():
    """5e-5 a step for 5000 steps: 0.875 in the middle, where it jumps to 0.5."""
    strategy = HyperInterval(kappa_slope=5e-5)

    class At:
        experience = toy_stream(DOMAIN).experiences[0]
        experience_steps = (5000,)

        def __init__(self, step):
            self.progress = step / 5000

    assert [round(strategy.kappa_at(At(step)), 6) for step in (0, 1000, 2499, 2500, 4999)] == [
        1,
        0.95,
        0.87505,
        0.5,
        0.5,
    ]
    assert [strategy.ramped(At(step)) for step in (0, 1250, 2500, 5000)] == [0, 0.5, 1, 1]
    even = HyperInterval()
    assert [even.kappa_at(At(step)) for step in (0, 1250, 2500)] == [1, 0.75, 0.5]
    assert HyperInterval(ramp=0.0).kappa_at(At(0)) == 0.5


def test_worst_case_by_hand():
    box = Interval.of(torch.tensor([[1.0, 2.0, -1.0]] * 2), torch.tensor([[3.0, 5.0, 0.0]] * 2))
    assert worst_case(box, torch.tensor([1, 2])).tolist() == [[3.0, 2.0, 0.0], [3.0, 5.0, -1.0]]


# answers


def test_one_set_of_weights_answers_for_all_tasks(lab):
    _, trainer = lab.run([HyperInterval(**OPTIONS)], CLASS, optimizer=ADAM)
    net, batch = trainer.state.model.eval(), trainer.state.prepare(lab.plain_sum(lab.stream_of(CLASS), range(3)))
    p = lab.weights(net)
    centres = torch.stack([0.4 / 10 * p[f"embeddings.{c}"].cos() for c in range(3)])
    middle = ((centres - 0.08).amax(0) + (centres + 0.08).amin(0)) / 2
    hidden = (p["generator.body.0.weight"] @ middle + p["generator.body.0.bias"]).relu()
    v, c, w, b = parts(p["generator.last.weight"] @ hidden + p["generator.last.bias"], 6)
    wanted = (batch.inputs.flatten(1) @ w.T + b).relu() @ v.T + c
    lab.close(net(batch).logits, wanted)
    # without the hypernetwork
    plain = net.materialised(None, net.universal())
    lab.close(plain(batch).logits.detach(), wanted)


def test_answers_of_the_settings():
    assert wrapped(ToyNet, TASK).answers == "own"
    assert wrapped(ToyNet, CLASS).answers == "universal"
    assert wrapped(ToyNet, CLASS, nested=False).answers == "entropy"
    assert wrapped(ToyNet, TASK, answers="universal").answers == "universal"
    with pytest.raises(UserError, match=r"hyper_interval\.answers is 'own', and rows of stream toy_class_incremental"):
        wrapped(ToyNet, CLASS, answers="own")


# what is refused


class Gelu(ToyNet):
    """A layer inside the body that nobody can bound."""

    def __init__(self, info):
        super().__init__(info)
        self.body = nn.Sequential(nn.Linear(12, 12), nn.GELU())

    def features(self, inputs):
        return self.body(super().features(inputs))


def test_a_layer_without_bounds_is_named_before_training():
    sentence = r"no bounds of gelu in layer body\.1 \(GELU\) of backbone Gelu; it supports Linear, .*BatchNorm.*pooling"
    with pytest.raises(UserError, match=sentence):
        wrapped(Gelu)
    with pytest.raises(UserError, match=r"no bounds of layer layers \(LSTM\) of backbone Recurrent; it supports"):
        wrapped(Recurrent)


def test_bounds_that_say_nothing_are_refused_before_training():
    with pytest.raises(UserError, match=r"epsilon is 100, which leaves the logits of backbone Mlp .* apart"):
        wrapped(Mlp, epsilon=100.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": -1.0}, r"hyper_interval\.epsilon is -1.0"),
        ({"kappa": 1.5}, r"hyper_interval\.kappa is 1.5; it must be from 0 to 1"),
        ({"answers": "all"}, r"hyper_interval\.answers is 'all'; it must be one of own, universal, entropy"),
        ({"answers": "universal", "nested": False}, r"it must be own or entropy unless nested=true"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(UserError, match=sentence):
        HyperInterval(**options)


def test_nested_boxes_go_on_after_a_stop(tmp_path):
    """The contract runs free boxes; nested ones keep their ends too."""
    from cl.testing.probe import equal, train

    def make(targets):
        return [HyperInterval(**(OPTIONS | {"targets": targets}))]

    for targets in ("weights", "generator"):
        whole, folder = train(CLASS, make(targets), epochs=1), tmp_path / targets
        first = train(CLASS, make(targets), epochs=1, run_dir=folder, stop_at=30)
        second = train(CLASS, make(targets), epochs=1, run_dir=folder, resume=True)
        assert first.losses + second.losses == whole.losses
        assert equal(second.weights, whole.weights)


def test_plain_outputs_are_left_to_the_backbone():
    net, batch = wrapped(ToyNet).train(), rows(task=1)
    output = net(batch)
    assert isinstance(output, Output)
    assert not isinstance(output.logits, Interval)
