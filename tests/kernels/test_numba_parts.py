"""What loops over pieces are made of: products of small matrices against NumPy's, activations against torch's."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from kernels.common import numba
from kernels.common.numba_product import add, move, product
from kernels.common.numba_vectors import VECTOR
from kernels.neural_memory.numba_parts import GELU, SILU, activated, bent, normal

EXACT = {"float32": 2e-6, "float64": 4e-15}
both = pytest.mark.parametrize("dtype", EXACT)
# rows, summands, vectors side by side
SIZES = [(4, 1, 1), (8, 5, 2), (12, 32, 3), (32, 17, 5)]


@numba.compiled
def _products(out, left, right, first, second, kind):
    half = out.dtype.type(0.5)
    if kind == 0:
        product(out, left, right)
    elif kind == 1:
        add(out, left, right)
    else:
        move(out, half, first, -half, second, left, right)


@numba.compiled
def _activations(out, slope, bend, plain, x, kind):
    bent(out, slope, bend, x, kind)
    activated(plain, x, kind)


@numba.compiled
def _normals(below, density, x):
    for i in range(x.size):
        below[i], density[i] = normal(x[i])


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lying", ["as it is", "transposed", "apart"])
@pytest.mark.parametrize("kind", range(3))
def test_product(dtype, size, lying, kind):
    rng = np.random.default_rng(0)
    rows, count, vectors = size
    width = vectors * VECTOR // np.dtype(dtype).itemsize
    gap = 3 if lying == "apart" else 0

    def drawn(rows, width):
        return rng.standard_normal((rows, width + gap)).astype(dtype)[:, :width]

    left = drawn(count, rows).T if lying == "transposed" else drawn(rows, count)
    right, first, second = drawn(count, width), drawn(rows, width), drawn(rows, width)
    room = np.full((rows + 2, width + gap), 7, dtype)
    out = room[1:-1, :width]
    out[:] = first
    truth = left.astype(np.float64) @ right.astype(np.float64)
    truth += [0, first, 0.5 * first.astype(np.float64) - 0.5 * second][kind]
    _products(out, left, right, first, second, kind)
    assert np.linalg.norm(out - truth) <= EXACT[dtype] * np.linalg.norm(truth)
    assert (room[[0, -1]] == 7).all() and (room[:, width:] == 7).all()


def test_what_moves_may_be_where_it_goes():
    rng = np.random.default_rng(0)
    out, left, right = (rng.standard_normal(shape) for shape in ((8, 16), (8, 3), (3, 16)))
    truth = 0.5 * out - 0.5 * out + left @ right
    _products(out, left, right, out, out, 2)
    np.testing.assert_allclose(out, truth, rtol=1e-14)


@both
@pytest.mark.parametrize(("kind", "function"), [(GELU, torch.nn.functional.gelu), (SILU, torch.nn.functional.silu)])
def test_activations_and_two_derivatives(dtype, kind, function):
    x = np.linspace(-8, 8, 1601, dtype=dtype).reshape(1, -1)
    found = [np.empty_like(x) for _ in range(4)]
    _activations(*found, x, kind)
    exact = torch.from_numpy(x).double().requires_grad_()
    truth = function(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), exact)
    for one, other in zip(found, (truth, slope, bend, truth), strict=True):
        assert np.linalg.norm(one - other.detach().numpy()) <= EXACT[dtype] * other.norm().item()


@both
def test_normal_is_exact_in_its_tail(dtype):
    x = np.linspace(-12, 12, 4801, dtype=dtype)
    below, density = np.empty_like(x), np.empty_like(x)
    _normals(below, density, x)
    exact = x.astype(np.float64)
    share = np.asarray([math.erfc(-value * math.sqrt(0.5)) / 2 for value in exact])
    peak = np.exp(-exact * exact / 2) / math.sqrt(2 * math.pi)
    # a rounded square goes into an exponential
    tolerance = {"float32": 2e-5, "float64": 1e-13}[dtype]
    assert (abs(below - share) / share).max() < tolerance and (abs(density - peak) / peak).max() < tolerance
    near = abs(x) < 1
    assert (abs(below - share) / share)[near].max() < {"float32": 1e-6, "float64": 1e-15}[dtype]
