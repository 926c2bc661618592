"""The foreseen parameters against a real step of a cloned optimizer, after some steps that gave it state."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from cl.core import UserError
from strategies import _lookahead
from strategies._lookahead import require_planned, stepped

CASES = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.2}),
    (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
]


def check(kind, options, num_steps):
    """Two groups with rates of their own, a parameter without gradient, and state from `num_steps` steps."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 3), torch.randn(5), torch.randn(2)]
    parameters = [torch.nn.Parameter(w.double()) for w in weights]
    optimizer = kind([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.003}], **options)

    def new_gradients():
        for p in parameters[:2]:
            p.grad = torch.randn(p.shape, dtype=torch.float64)

    for _ in range(num_steps):
        new_gradients()
        optimizer.step()
    new_gradients()
    state = deepcopy(optimizer.state_dict())
    found = stepped(optimizer, parameters)
    before = [p.detach().clone() for p in parameters]
    assert str(optimizer.state_dict()) == str(state), "the state of the optimizer must stay as it is"
    # deepcopy keeps parameters and groups together
    cloned, copies = deepcopy((optimizer, parameters))
    for copy, p in zip(copies, parameters, strict=True):
        copy.grad = None if p.grad is None else p.grad.clone()
    cloned.step()
    for copy, old, ahead, p in zip(copies, before, found, parameters, strict=True):
        torch.testing.assert_close(ahead, copy.detach(), rtol=0, atol=1e-7)
        assert torch.equal(p.detach(), old)
    assert torch.equal(found[2], before[2])


@pytest.mark.parametrize("num_steps", [0, 1, 5])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_stepped_is_what_a_cloned_optimizer_does(kind, options, num_steps):
    check(kind, options, num_steps)


def test_the_oracle_needs_the_state(lab, monkeypatch):
    rule = _lookahead.RULES[torch.optim.Adam]
    monkeypatch.setitem(_lookahead.RULES, torch.optim.Adam, lambda p, g, state, group: rule(p, g, {}, group))
    lab.dies(lambda: check(*CASES[3], 5))


def test_an_optimizer_that_cannot_be_foreseen_is_named():
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"hypernet\.lookahead foresees .*SGD, Adam, AdamW, RMSprop.*is Adagrad"):
        require_planned(torch.optim.Adagrad([p]), "hypernet.lookahead")
