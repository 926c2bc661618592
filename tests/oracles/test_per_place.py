"""Convolutions' sums over rows against one backward pass per row, in float64, on every road that costs choose."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from strategies import _per_place
from strategies._per_place import summed_over_places

SHAPES = {
    "wide maps, few channels: places last": (partial(nn.Conv2d, 1, 4, kernel_size=3), (9, 11)),
    "small maps, many channels: places first": (partial(nn.Conv2d, 5, 4, kernel_size=3), (5, 6)),
    "strided, padded and dilated, unequal": (
        partial(nn.Conv2d, 5, 3, kernel_size=(3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
        (8, 9),
    ),
    "the same, places last": (
        partial(nn.Conv2d, 1, 3, kernel_size=(3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3)),
        (8, 19),
    ),
    "pointwise": (partial(nn.Conv2d, 6, 4, kernel_size=1), (4, 3)),
    "four places": (partial(nn.Conv2d, 5, 4, kernel_size=3, padding=1), (2, 2)),
    "two places, places last": (partial(nn.Conv2d, 1, 4, kernel_size=(3, 1)), (3, 2)),
    "one place": (partial(nn.Conv2d, 3, 4, kernel_size=2), (2, 2)),
}
FUNCTIONS = {"square": torch.square, "abs": torch.abs, "any other": torch.sigmoid, "none": lambda g: g}


def case(name, num_rows=7):
    """(layer, inputs, gradient by outputs) in float64."""
    torch.manual_seed(0)
    make, size = SHAPES[name]
    layer = make(bias=False).double()
    a = torch.randn(num_rows, layer.in_channels, *size, dtype=torch.float64)
    return layer, a, torch.randn_like(layer(a))


def row_by_row(layer, a, delta, function):
    total = torch.zeros_like(layer.weight)
    for x, d in zip(a, delta, strict=True):
        (gradient,) = torch.autograd.grad((layer(x[None]) * d).sum(), layer.weight)
        total += function(gradient)
    return total


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_it_is_the_sum_over_rows(name, function, is_channels_last, monkeypatch):
    layer, a, delta = case(name)
    form = torch.channels_last if is_channels_last else torch.contiguous_format
    wanted = row_by_row(layer, a, delta, FUNCTIONS[function])
    for most in (1, 1000, 1 << 20):  # row by row, a few with a rest, all at once
        monkeypatch.setitem(_per_place.MAX_NUMBERS, "cpu", most)
        given = [v.clone(memory_format=form) for v in (a, delta)]
        found = summed_over_places(layer, *given, FUNCTIONS[function])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert torch.equal(given[0], a) and torch.equal(given[1], delta), "rows are overwritten, never what was given"


@pytest.mark.parametrize(
    ("name", "function", "road"),
    [
        ("four places", torch.square, "_by_pairs"),
        ("two places, places last", torch.square, "_by_pairs"),
        ("four places", torch.abs, "_by_rows"),
        ("pointwise", torch.square, "_by_rows"),
        ("one place", torch.square, None),
        ("one place", torch.abs, None),
        ("one place", torch.sigmoid, "_by_rows"),
    ],
)
def test_roads(name, function, road, monkeypatch):
    """Which form is taken: pairs only for squares of few places, nothing written down at a single place."""
    taken = []
    for each in ("_by_pairs", "_by_rows"):
        call = getattr(_per_place, each)
        monkeypatch.setattr(_per_place, each, lambda *a, call=call, each=each: taken.append(each) or call(*a))
    summed_over_places(*case(name), function)
    assert taken == ([] if road is None else [road])


def test_the_oracle_needs_the_pairs_of_two_places():
    layer, a, delta = case("four places")
    wanted = row_by_row(layer, a, delta, torch.square)
    patches = F.unfold(a, 3, padding=1).transpose(1, 2)
    alone = delta.flatten(2).square().transpose(1, 2).flatten(0, 1).T @ patches.square().flatten(0, 1)
    assert not torch.allclose(alone.view_as(wanted), wanted, rtol=0.1)
