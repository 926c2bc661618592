"""Sums of functions of per-row gradients: taken apart or vectorised, they are those of one backward pass per row."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones import MultiHead
from cl.core import Batch, Output
from strategies._modes import evaluation_mode
from strategies._per_row import Rows, VectorisedSum, add_by_loop
from strategies.mas import squared_length
from strategies.refresh import likelihood_weighted

NUM = 11


class Net(nn.Module):
    """A body under a linear head."""

    def __init__(self, body, width):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 4)

    def forward(self, batch):
        hidden = self.body(batch.inputs).flatten(1)
        return Output(self.head(hidden), hidden)


class Twice(nn.Module):
    """One layer used twice, and one whose weight is also used by itself."""

    def __init__(self):
        super().__init__()
        self.again, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.again(self.again(x).relu()).relu()
        return self.shared(x) + x @ self.shared.weight


class Sequence(nn.Module):
    """A linear layer on rows of several vectors."""

    def __init__(self):
        super().__init__()
        self.each, self.last = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.last(self.each(x.view(-1, 2, 3)).relu().sum(1))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.heads = nn.Linear(6, 5), MultiHead(5, 4, 3)

    def forward(self, batch):
        hidden = self.first(batch.inputs).relu()
        return Output(self.heads(hidden, batch.task_id), hidden)


def conv(**options):
    return Net(nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(2)), 8)


IMAGES, VECTORS = (2, 7, 6), (6,)
CASES = {
    "mlp": (lambda: Net(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)), 5), VECTORS, 3),
    "conv": (conv, IMAGES, 3),
    "conv, stride, padding, dilation": (partial(conv, stride=2, padding=(1, 2), dilation=(1, 2)), IMAGES, 3),
    "conv, groups": (lambda: Net(nn.Conv2d(2, 4, 3, groups=2), 4 * 5 * 4), IMAGES, 1),
    "conv, padded by name": (partial(conv, padding="same"), IMAGES, 2),
    "batch norm of images": (
        lambda: Net(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()), 60),
        IMAGES,
        3,
    ),
    "batch norm of vectors": (lambda: Net(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 5), VECTORS, 3),
    "layer norm": (lambda: Net(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), 5), VECTORS, 2),
    "a layer used twice, a weight used by itself": (lambda: Net(Twice(), 6), VECTORS, 1),
    "a layer on sequences": (lambda: Net(Sequence(), 5), VECTORS, 2),
    "a head per task": (Heads, VECTORS, 4),
}


def rows_for(shape, loss, function, num_tasks=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (NUM,), generator=generator)
    zeros = torch.zeros(NUM, dtype=torch.int64)
    task_id = None if num_tasks is None else torch.arange(NUM) % num_tasks
    factors = torch.rand(NUM, generator=generator, dtype=torch.float64) + 0.5
    return Rows(Batch(x, y, zeros, torch.arange(NUM), task_id), y, factors, loss, function)


def both(case, loss=F.cross_entropy, function=torch.square, num_tasks=None, frozen=()):
    """(found, wanted, layers taken apart, rows counted)."""
    make, shape, _ = CASES[case]
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    counted = []
    state = SimpleNamespace(
        model=model,
        parameters=lambda: {n: p for n, p in model.named_parameters() if p.requires_grad},
        count=lambda forwards=0, backwards=0: counted.append((forwards, backwards)),
    )
    rows = rows_for(shape, loss, function, num_tasks)
    found, wanted = ({n: torch.zeros_like(p) for n, p in state.parameters().items()} for _ in range(2))
    with evaluation_mode(model):
        vectorised = VectorisedSum(state, found)
        vectorised.add(rows)
        passes = len(counted)
        add_by_loop(state, wanted, rows, 1)
    assert not any(m._forward_hooks for m in model.modules())
    return found, wanted, vectorised.layers, counted[:passes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [torch.square, torch.abs])
@pytest.mark.parametrize("loss", [F.cross_entropy, squared_length, likelihood_weighted])
def test_it_is_the_sum_over_rows(lab, case, function, loss):
    found, wanted, layers, _ = both(case, loss, function, 3 if case == "a head per task" else None)
    lab.close(found, wanted, rtol=1e-9, atol=1e-14)
    assert lab.flat(wanted).max() > 1e-3
    assert len(layers) == CASES[case][2], sorted(layers)


def test_other_functions_go_through_vmap(lab):
    found, wanted, layers, counted = both("mlp", function=torch.sigmoid)
    lab.close(found, wanted, rtol=1e-9)
    assert layers == {} and counted == [(NUM, NUM)]


def test_heads_that_no_row_asks_for_get_nothing(lab):
    found, wanted, layers, _ = both("a head per task", num_tasks=1)
    lab.close(found, wanted, rtol=1e-9, atol=1e-14)
    assert len(layers) == 4 and not found["heads.heads.2.weight"].any()


def test_frozen_parameters_have_no_entry(lab):
    found, wanted, _, _ = both("mlp", frozen=("body.0.bias", "body.2.weight"))
    lab.close(found, wanted, rtol=1e-9)
    assert set(found) == {"body.0.weight", "head.weight", "head.bias"}


def test_passes_are_counted():
    """Eight rows twice to see which layers can be taken apart, then all rows once, and once more for what is left."""
    assert both("mlp")[3] == [(8, 8), (8, 8), (NUM, NUM)]
    assert both("layer norm")[3] == [(8, 8), (8, 8), (NUM, NUM), (NUM, NUM)]


def test_the_oracle_needs_the_factors(lab, monkeypatch):
    monkeypatch.setattr("strategies._per_row.torch.allclose", lambda *_: True)
    lab.dies(
        lambda: test_it_is_the_sum_over_rows(
            lab, "a layer used twice, a weight used by itself", torch.square, F.cross_entropy
        )
    )
