"""The scan: a second oracle; and what resets are turned into for the other ops."""

import kernel_properties as props
import pytest
import torch
from kernel_properties import CASES

from kernels.linear_scan import linear_scan


def test_scan_against_associative_scan():
    from torch._higher_order_ops.associative_scan import associative_scan

    inputs = props.draw(CASES["scan_real"], 33)
    inputs["u"][:, 0] += inputs["a"][:, 0] * inputs["initial_state"]

    def combine(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1]

    _, truth = associative_scan(combine, (inputs["a"], inputs["u"]), dim=1, combine_mode="generic")
    found, _ = linear_scan(inputs["a"], inputs["u"])
    assert props.error(found, truth) < 1e-12


def test_reset_flags_become_offsets():
    from kernels.common import cu_seqlens_from_reset

    case = CASES["gated_deltanet"]
    inputs = props.draw(case, 10)
    del inputs["initial_state"]
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 4] = True
    packed = {n: x.flatten(0, 1)[None] for n, x in inputs.items()}
    out, _ = case.op(**packed, cu_seqlens=cu_seqlens_from_reset(reset))
    alone, _ = case.op(**{n: x[:1, 4:] for n, x in inputs.items()})
    torch.testing.assert_close(out[:, 4:10], alone, rtol=1e-10, atol=0)


def test_a_batch_of_nothing():
    u = torch.ones(0, 4, 2, requires_grad=True)
    h, last = linear_scan(torch.ones(0, 4, 2), u)
    h.sum().backward()
    assert (h.shape, last.shape, u.grad.shape) == (u.shape, (0, 2), u.shape)


@pytest.mark.filterwarnings("error")
def test_real_start_of_a_complex_scan():
    """h_1 = a h_0 + u with a = 2 - 3j: the real part of h_1 moves by 2, the imaginary part by -3."""
    start = torch.ones(1, 1, requires_grad=True)
    a, u = (torch.full((1, 1, 1), x, dtype=torch.complex64) for x in (2 - 3j, 1j))
    _, last = linear_scan(a, u, initial_state=start)
    (grad,) = torch.autograd.grad(last.real.sum() + 10 * last.imag.sum(), start)
    assert (last.item(), grad.item()) == (2 - 2j, 2 - 30)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_half_complex_keeps_its_imaginary_part():
    a, u = (torch.full((1, 3, 1), x, dtype=torch.complex32) for x in (0.5j, 1 + 1j))
    h, last = linear_scan(a, u)
    assert (h.dtype, last.dtype) == (torch.complex32, torch.complex64)
    assert last.item() == (1 + 1j) * (1 + 0.5j - 0.25)
