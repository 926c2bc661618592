"""What layers do in one pass over memory: against the formulas in float64, token by token where there is time."""

import math
from functools import partial

import pytest
import torch

pytest.importorskip("numba")

from kernels.common import fused, numba, numba_fused


@pytest.fixture(autouse=True)
def small_calls_too(monkeypatch):
    """Loops for every size."""
    monkeypatch.setattr(fused, "WORTH", 0)
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()


def unit(x):
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def gated(gate, x):
    return gate / (1 + (-gate).exp()) * x


def convolved(x, tail, weight, reset):
    """Token by token: each sees itself and what came before it in its document."""
    rows = []
    for b in range(len(x)):
        seen, tokens = list(tail[b].unbind(0)), []
        for t in range(x.shape[1]):
            seen = [*([] if reset is not None and reset[b, t] else seen), x[b, t]]
            pairs = zip(reversed(seen), reversed(weight.unbind(1)), strict=False)
            total = sum(row * tap for row, tap in pairs)
            tokens.append(total / (1 + (-total).exp()))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def running_sum(x, starts):
    rows = []
    for b in range(len(x)):
        total, tokens = torch.zeros_like(x[b, 0]), []
        for t in range(x.shape[1]):
            total = x[b, t] + (0 if starts is not None and starts[b, t] else total)
            tokens.append(total)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def turned(x, angle):
    return torch.cat((x * angle.cos(), x * angle.sin()), -1)


def resets(rows, tokens, *places):
    found = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, token in places:
        found[row, token] = True
    return found


def by_loops(x, tail, weight, reset):
    return fused.convolved(x, tail, weight, reset, refuse)


def refuse(*_):
    raise AssertionError("the loops were to run")


def turned_by_loops(x, angle):
    return fused.turned(x, angle, angle.cos(), angle.sin())


BLOCK = numba_fused.BLOCK
CASES = {
    "rms": (partial(fused.rms_norm, eps=1e-3), rms, (drawn(2, BLOCK + 3, 7), drawn(7))),
    "rms, strided": (partial(fused.rms_norm, eps=1e-3), rms, (drawn(5, 3, 6).transpose(1, 2), drawn(3))),
    "unit": (fused.unit, unit, (drawn(2, 3, 4, 5),)),
    "gated": (fused.gated, gated, (drawn(BLOCK + 1, 5), drawn(BLOCK + 1, 5, seed=1))),
    "one row": (fused.gated, gated, (drawn(6), drawn(6, seed=1))),
    "convolved": (by_loops, convolved, (drawn(2, 9, 3), drawn(2, 3, 3), drawn(3, 4), None)),
    "convolved over lanes": (by_loops, convolved, (drawn(1, 2 * BLOCK + 2, 2), drawn(1, 3, 2), drawn(2, 4), None)),
    "convolved, short": (by_loops, convolved, (drawn(2, 2, 3), drawn(2, 3, 3), drawn(3, 4), None)),
    "one tap": (by_loops, convolved, (drawn(2, 4, 3), drawn(2, 0, 3), drawn(3, 1), None)),
    "documents": (
        by_loops,
        convolved,
        (drawn(2, 9, 3), drawn(2, 3, 3), drawn(3, 4), resets(2, 9, (0, 0), (0, 4), (0, 5), (1, 8))),
    ),
    "documents over lanes": (
        by_loops,
        convolved,
        (drawn(1, BLOCK + 4, 2), drawn(1, 3, 2), drawn(2, 4), resets(1, BLOCK + 4, (0, BLOCK - 1), (0, BLOCK + 2))),
    ),
    "sum": (fused.running_sum, running_sum, (drawn(2, 9, 2, 3), None)),
    "sums": (fused.running_sum, running_sum, (drawn(2, 9, 3), resets(2, 9, (0, 3), (1, 0), (1, 8)))),
    "turned": (turned_by_loops, turned, (drawn(2, 3, 4), drawn(2, 3, 4, seed=1))),
}
every = pytest.mark.parametrize(("found", "wanted", "given"), CASES.values(), ids=CASES)
# the convolution in torch is given by the caller: tests/unit/backbones/test_short_convolution.py
IN_TORCH = {name: case for name, case in CASES.items() if case[0] is not by_loops}


def differentiated(function, given):
    """Outputs, and gradients of a weighted sum of them, of what has gradients."""
    y = function(*given)
    asked = [x for x in given if x is not None and x.is_floating_point()]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return y, *torch.autograd.grad((weights * y).sum(), asked, materialize_grads=True)


def double(given):
    return [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in given]


def assert_near(found, wanted, tolerance=2e-6):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        one, other = one.detach(), other.detach()
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@every
def test_loops_and_their_gradients(found, wanted, given):
    y = differentiated(found, given)
    assert type(y[0].grad_fn).__name__ == "_OnePassBackward"
    assert_near(y, differentiated(wanted, double(given)))


@pytest.mark.parametrize(("found", "wanted", "given"), IN_TORCH.values(), ids=IN_TORCH)
def test_torch_says_the_same(found, wanted, given, monkeypatch):
    """What everything else runs: other dtypes, devices and transforms, and machines without numba."""
    monkeypatch.setattr(fused, "HAS_NUMBA", False)
    assert_near(differentiated(found, given), differentiated(wanted, double(given)))


@every
def test_threads_change_no_bit(found, wanted, given, monkeypatch):
    monkeypatch.setattr(numba, "WORTH", 0)
    alone, threads = differentiated(found, given), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, alone, differentiated(found, given)))
    finally:
        torch.set_num_threads(threads)


def test_more_taps_than_a_lane_has_tokens():
    """The tokens before are those of the first lane alone."""
    size = BLOCK + 5
    given = drawn(1, 2 * BLOCK + 7, 2), drawn(1, size - 1, 2, seed=1), drawn(2, size, seed=2), None

    def wanted(x, tail, weight, _):
        full = torch.cat((tail, x), 1).mT
        return torch.nn.functional.silu(torch.conv1d(full, weight.unsqueeze(1), groups=2)).mT

    assert_near(differentiated(by_loops, given), differentiated(wanted, double(given)))


def test_whole_turns_are_left_out():
    phase = drawn(1, 4000, 2) * 40
    found = fused.running_sum(phase, None, 2 * math.pi)
    exact = phase.double().cumsum(1)
    assert float(found.detach().min()) >= 0
    assert float(found.detach().max()) < 6.2832
    torch.testing.assert_close(found.double().sin(), exact.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.double().cos(), exact.cos(), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), phase)
    assert torch.equal(slope[0, :, 0], torch.arange(4000.0, 0, -1))


def test_gradients_of_gradients():
    """By torch's own operations, as the loops have none."""
    given = drawn(3, 4), drawn(4, seed=1)

    def second(function, given):
        (slope,) = torch.autograd.grad(function(*given).pow(2).sum(), given[0], create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), given)

    assert_near(second(partial(fused.rms_norm, eps=1e-3), given), second(rms, double(given)), 1e-5)


def test_many_gradients_at_once():
    x, weight = drawn(2, 3), drawn(3, seed=1)
    y, wide = fused.rms_norm(x, weight, 1e-3), double((x, weight))
    every = torch.eye(6).view(6, 2, 3)
    found = torch.func.vmap(lambda dy: torch.autograd.grad(y, (x, weight), dy, retain_graph=True))(every)
    expected = torch.autograd.grad(rms(*wide), wide, every.double(), is_grads_batched=True)
    assert_near(found, expected)


def test_rows_under_vmap_and_in_forward_mode():
    gate, x = drawn(3, 4).detach(), drawn(3, 4, seed=1).detach()
    slopes = torch.func.vmap(torch.func.grad(lambda g, x: fused.gated(g, x).sum()))(gate, x)
    wanted = torch.func.vmap(torch.func.grad(lambda g, x: gated(g, x).sum()))(gate.double(), x.double())
    assert_near([slopes], [wanted])
    _, found = torch.func.jvp(lambda g: fused.gated(g, x), (gate,), (torch.ones_like(gate),))
    assert_near([found], [wanted])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(dtype):
    x = drawn(3, 4).detach().to(dtype).requires_grad_()
    y = fused.unit(x)
    assert y.dtype == dtype
    assert type(y.grad_fn).__name__ != "_OnePassBackward"


def test_loops_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("KERNELS_BACKEND", "chunked")
    assert type(fused.unit(drawn(3, 4)).grad_fn).__name__ != "_OnePassBackward"
