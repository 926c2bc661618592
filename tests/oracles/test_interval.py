"""Bounds of layers against thousands of samples: no weights inside a box leave the bounds of the outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap

from strategies import _interval
from strategies._interval import Interval, Unbounded, ends

SAMPLES = 64
"""Weights drawn inside each box, all at once."""


RISING = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "leaky": nn.LeakyReLU, "log": nn.LogSigmoid}


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        out += 0.5 * x
        return out - x.mean(1, keepdim=True)


def network(kinds, generator):
    """Layers on images of 3x6x6, then a linear one, with running statistics that are no defaults."""
    layers, channels, side = [], 3, 6
    for kind in kinds:
        if kind == "conv":
            layers.append(nn.Conv2d(channels, 4, 3, stride=1 if side < 4 else 2, padding=1))
            channels, side = 4, side if side < 4 else (side + 1) // 2
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels))
        elif kind == "residual":
            layers.append(Residual(nn.Conv2d(channels, channels, 1)))
        elif kind in ("max", "average") and side >= 2:
            layers.append(nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2))
            side //= 2
        elif kind in RISING:
            layers.append(RISING[kind]())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 5)).double().eval()
    for buffer in model.buffers():
        if buffer.dtype.is_floating_point:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def inside(low, up, generator, *shape):
    """Points of the box; each number is at an end half of the time."""
    share = torch.rand(*shape, *low.shape, generator=generator).double()
    at_end = torch.rand(share.shape, generator=generator) < 0.5
    return low + torch.where(at_end, share.round(), share) * (up - low)


def check_sound(kinds, radius, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = network(kinds, generator)
    boxes = {}
    for name, p in model.named_parameters():
        centre, r = torch.randn(p.shape, generator=generator).double(), torch.rand(p.shape, generator=generator)
        boxes[name] = (centre - radius * r, centre + radius * r)
    x = torch.randn(2, 3, 6, 6, generator=generator).double()
    x_low, x_up = x, x + spread * torch.rand(x.shape, generator=generator)
    given_x = Interval.of(x_low, x_up) if spread else x
    with torch.no_grad():
        found = functional_call(model, {name: Interval.of(*box) for name, box in boxes.items()}, (given_x,))
        assert found.shape == (2, 5)
        low, up = ends(found)
        slack = 1e-5 * (1 + up.abs() + low.abs())
        weights = {name: inside(*box, generator, SAMPLES) for name, box in boxes.items()}
        y = vmap(lambda w, x: functional_call(model, w, (x,)))(weights, inside(x_low, x_up, generator, SAMPLES))
        assert (low - slack <= y).all()
        assert (y <= up + slack).all()
        if radius == 0 and spread == 0:
            torch.testing.assert_close(low, up)
    return low, up


kinds_of_layers = st.lists(st.sampled_from(["conv", "norm", "residual", "max", "average", *RISING]), max_size=5)


@settings(max_examples=80, deadline=None)
@given(kinds_of_layers, st.sampled_from([0.0, 0.01, 0.3, 2.0]), st.sampled_from([0.0, 0.1, 1.5]), st.integers(0, 2**31))
def test_no_weights_inside_the_box_leave_the_bounds(kinds, radius, spread, seed):
    check_sound(kinds, radius, spread, seed)


CASE = (["conv", "norm", "relu", "average"], 0.3, 0.0, 3)


def careless_linear(x, weight, bias=None):
    """The published formula for inputs that are never negative, on inputs that are."""
    (x_low, x_up), (w_low, w_up) = ends(x), ends(weight)
    low = F.linear(x_low, w_low.clamp(min=0)) + F.linear(x_up, w_low.clamp(max=0))
    up = F.linear(x_up, w_up.clamp(min=0)) + F.linear(x_low, w_up.clamp(max=0))
    return Interval.of(low + ends(bias)[0], up + ends(bias)[1])


@pytest.mark.parametrize(
    ("name", "rule", "kinds"),
    [
        ("linear", careless_linear, ["tanh"]),
        ("batch_norm", lambda x, *_, **__: x if isinstance(x, Interval) else Interval.of(x, x), ["norm"]),
        ("conv2d", lambda x, w, *rest: Interval.of(*(F.conv2d(x, end, None, *rest[1:]) for end in ends(w))), ["conv"]),
    ],
)
def test_samples_find_an_unsound_rule(lab, monkeypatch, name, rule, kinds):
    monkeypatch.setitem(_interval.RULES, name, rule)

    def several():
        for seed in range(5):
            check_sound(kinds, 0.3, 0.0, seed)

    lab.dies(several)


def test_one_layer_is_bounded_exactly_where_inputs_have_one_sign():
    """All corners of a small box: the least and the largest output are the bounds."""
    generator = torch.Generator().manual_seed(0)
    low, up = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator).abs()
    up = low + up
    for x_low, x_up in ([0.0, 0.5, 2.0], [1.0, 0.5, 3.0]), ([-1.0, -0.5, -2.0], [0.0, -0.25, 0.0]):
        box = Interval.of(torch.tensor([x_low]), torch.tensor([x_up]))
        found_low, found_up = ends(F.linear(box, Interval.of(low, up)))
        corners = []
        for number in range(2**6):
            bits = torch.tensor([number >> k & 1 for k in range(6)]).bool()
            x = torch.where(bits[:3], torch.tensor(x_up), torch.tensor(x_low))
            corners.append(torch.where(bits[3:], up, low) @ x)
        torch.testing.assert_close(found_low[0], torch.stack(corners).amin(0))
        torch.testing.assert_close(found_up[0], torch.stack(corners).amax(0))


def test_gradients_flow_through_in_place_sums():
    low, up = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    x = 2 * Interval.of(low, up)
    also = x
    x += Interval.of(low, up)
    ends(also)[1].sum().backward()
    assert up.grad.tolist() == [3.0] * 3
    with pytest.raises(Unbounded, match="add_"):
        torch.zeros(3).__iadd__(Interval.of(low, up))


@pytest.mark.parametrize("activation", [F.relu, F.elu, F.leaky_relu])
def test_what_is_written_in_place_is_the_interval_from_there_on(activation):
    """Both ends, and their gradients, are those of a plain tensor, whose activation is added to itself."""
    values = [-1.0, -2.0, 0.5], [2.0, -0.5, 3.0]
    low, up = (torch.tensor(end, requires_grad=True) for end in values)
    x = 1.0 * Interval.of(low, up)
    activation(x, inplace=True)
    for end, value, found in zip((low, up), values, ends(x + x), strict=True):
        plain = torch.tensor(value, requires_grad=True)
        twice = 2 * activation(plain)
        torch.testing.assert_close(found, twice)
        (wanted,) = torch.autograd.grad(twice.sum(), plain)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), end, retain_graph=True)[0], wanted)


@pytest.mark.parametrize(
    "call",
    [
        F.gelu,
        lambda x: x.softmax(0),
        lambda x: torch.add(x, x, alpha=-1),
        torch.sin,
        lambda x: F.elu(x, alpha=-1.0),
    ],
)
def test_what_may_fall_is_refused(call):
    with pytest.raises(Unbounded):
        call(Interval.of(torch.zeros(3), torch.ones(3)))
