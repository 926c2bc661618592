"""The Triton kernels of the nonlinear recurrences in the interpreter: float32 and float16, never bfloat16."""

import os

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS, OFFSETS
from rnn_cases import ON_TRITON, RNN_CASES, carried

import kernels.newton_rnn as newton_module
from kernels.newton_rnn import newton_rnn, newton_rnn_with_report
from kernels.sequential_rnn import m2rnn

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")
every = pytest.mark.parametrize("case", [RNN_CASES[n] for n in ON_TRITON], ids=ON_TRITON)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Two chunks side by side: several blocks of time in a short test."""
    monkeypatch.setattr(newton_module, "TRITON_ROWS", 2)


@pytest.mark.parametrize("name", ["newton_gru", "sequential_lstm", "m2rnn"])
def test_agrees_with_token_loop(name, nan_scratch):
    # every case and scale: its slow twin below
    case = RNN_CASES[name]
    props.assert_agrees(case, props.draw(case, 18, "cos 0.5"), "triton", torch.float32, chunk=16)


@every
@pytest.mark.slow
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_all_scales(case, kind, nan_scratch):
    props.assert_agrees(case, props.draw(case, 37, kind), "triton", torch.float32, chunk=16)


@every
@pytest.mark.slow
def test_float16(case):
    props.assert_agrees(case, props.draw(case, 20), "triton", torch.float16, chunk=16)


@every
@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16, 17])
def test_any_length(case, length):
    props.assert_agrees(case, props.draw(case, length), "triton", torch.float32, chunk=16)


@every
@pytest.mark.slow
def test_packed_sequences(case, nan_scratch):
    cu = torch.tensor(OFFSETS, dtype=torch.int32)
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, OFFSETS[-1], "cos 0.5", OFFSETS).items()}
    props.assert_agrees(case, inputs, "triton", torch.float32, cu_seqlens=cu, chunk=16)


@every
@pytest.mark.slow
def test_reset_and_packed(case, nan_scratch):
    cu = [0, 0, 7, 8, 20]
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 3] = reset[0, 8] = reset[0, 15] = True
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, 20, "cos 0.5", cu).items()}
    options = {"reset": reset, "cu_seqlens": torch.tensor(cu)}
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16, **options)


@every
@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 17])
def test_carry(case, cut):
    inputs = props.cast(props.draw(case, 25, "cos 0.5"), torch.float32)
    whole = props.tensors_of(case, inputs, backend="triton", chunk=16)
    parts = props.tensors_of(carried(case, cut), inputs, backend="triton", chunk=16)
    props.assert_close(case, inputs, parts, whole, 1e-5)


@every
@pytest.mark.slow
def test_without_start_and_bit_equal(case, nan_scratch):
    inputs = props.draw(case, 18)
    del inputs["initial_state"]
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)
    given = props.cast(inputs, torch.float32)
    first, second = (props.tensors_of(case, given, backend="triton", chunk=16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_units_beyond_one_tile(cell):
    gen = torch.Generator().manual_seed(0)
    x, r = torch.randn(1, 20, 3, 21, generator=gen), torch.randn(3, 21, generator=gen)
    found = newton_rnn(x, r, cell=cell, chunk=16, backend="triton")
    truth = newton_rnn(x.double(), r.double(), cell=cell, backend="reference")
    assert max(props.error(a, b) for a, b in zip(found, truth, strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_report(cell):
    """Solved, walked on demand, and fallen back: three different reports, one result."""
    gen = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, 40, 3, 5, generator=gen), torch.rand(3, 5, generator=gen)
    truth = newton_rnn(x.double(), r.double(), cell=cell, backend="reference")[0]
    given = {"cell": cell, "chunk": 16, "backend": "triton"}
    h, _, solved = newton_rnn_with_report(x, r, **given)
    walked_h, _, walked = newton_rnn_with_report(x, r, max_iterations=0, **given)
    failed_h, _, failed = newton_rnn_with_report(x, r, max_iterations=1, tolerance=1e-30, **given)
    assert len(solved.iterations) == len(walked.iterations) == 4
    assert not solved.sequential.any() and (solved.residual <= 1e-6).all()
    assert walked.sequential.all() and (walked.iterations == -1).all()
    # a residual of exactly zero is solved at any tolerance
    assert ((failed.iterations == 1) | (failed.residual == 0)).all()
    assert all(props.error(x, truth) < 1e-6 for x in (h, walked_h, failed_h))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_newton_corrects_long_memories(cell, monkeypatch):
    """Gates that keep nearly everything: the first walk is far off, and the scan over the chunks has to mend it."""
    monkeypatch.setattr(newton_module, "TRITON_ROWS", 4)
    gen = torch.Generator().manual_seed(0)
    x, r = torch.randn(1, 64, 3, 3, generator=gen), torch.rand(3, 3, generator=gen)
    x[:, :, 0] += 4 if cell == "lstm" else -4
    start = torch.randn(1, *((2, 3) if cell == "lstm" else (3,)), generator=gen)
    given = {"cell": cell, "initial_state": start}
    h, last, report = newton_rnn_with_report(x, r, chunk=16, backend="triton", **given)
    truth = newton_rnn(x.double(), r.double(), backend="reference", **{**given, "initial_state": start.double()})
    assert 1 <= report.iterations.item() <= 4
    assert not report.sequential.any()
    assert max(props.error(a, b) for a, b in zip((h, last), truth, strict=True)) < 1e-6


def test_not_finite_is_not_solved():
    """A maximum that steps over NaN would call this converged."""
    gen = torch.Generator().manual_seed(0)
    x, r = torch.randn(1, 32, 3, 3, generator=gen), torch.rand(3, 3, generator=gen)
    x[0, 10, 2, 1] = float("nan")
    h, _, report = newton_rnn_with_report(x, r, chunk=16, backend="triton")
    assert report.sequential.all()
    assert torch.isfinite(h[..., [0, 2]]).all() and torch.isfinite(h[:, :10]).all()


@pytest.mark.slow
def test_m2rnn_tiles_of_keys_and_clip():
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 10, 1, 40, generator=gen) for _ in range(2))
    v, f, w = (
        torch.randn(1, 10, 1, 20, generator=gen),
        torch.rand(1, 10, 1, generator=gen),
        torch.randn(20, 20, generator=gen),
    )
    leaves = [x.requires_grad_() for x in (q, k, v, f, w / 5)]
    runs = []
    for backend in ("chunked", "triton"):
        o, state = m2rnn(*leaves, clip=0.5, chunk=16, backend=backend)
        runs.append([o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)])
    assert max(props.error(a, b) for a, b in zip(*runs, strict=True)) < 1e-5


def test_bfloat16_is_upcast_on_the_host():
    case = RNN_CASES["sequential_lstm"]
    given = props.cast(props.draw(case, 12), torch.bfloat16)
    found = props.tensors_of(case, given, backend="triton")
    assert found[0].dtype == torch.bfloat16
    props.assert_close(case, given, found, props.truth_of(case, given), 8e-3)
