"""Newton and the M2RNN in the interpreter, beyond what all ops are tested for: reports, corrections, tiles."""

import os

import kernel_properties as props
import pytest
import torch

import kernels.newton_rnn as newton_module
from kernels.newton_rnn import newton_rnn, newton_rnn_with_report
from kernels.sequential_rnn import m2rnn

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")


def drawn(cell, is_block, length, width, batch=1):
    """Gate inputs, recurrent weights (positive) and an initial state."""
    gen = torch.Generator().manual_seed(0)
    units = (1, width) if is_block else (width,)
    x = torch.randn(batch, length, 3, *units, generator=gen)
    r = torch.rand(3, *units, *units[1:], generator=gen)
    start = torch.randn(batch, *((2,) if cell == "lstm" else ()), *units, generator=gen)
    return x, r / width**0.5 if is_block else r, start


CELLS = pytest.mark.parametrize(
    ("cell", "is_block"), [("gru", False), ("lstm", False), ("gru", True), ("lstm", True)],
    ids=["gru", "lstm", "block_gru", "block_lstm"],
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Two chunks side by side: several blocks of time in a short test."""
    monkeypatch.setattr(newton_module, "TRITON_ROWS", 2)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_units_beyond_one_tile(cell):
    gen = torch.Generator().manual_seed(0)
    x, r = torch.randn(1, 20, 3, 21, generator=gen), torch.randn(3, 21, generator=gen)
    found = newton_rnn(x, r, cell=cell, chunk=16, backend="triton")
    truth = newton_rnn(x.double(), r.double(), cell=cell, backend="reference")
    assert max(props.error(a, b) for a, b in zip(found, truth, strict=True)) < 1e-6


@pytest.mark.slow
@CELLS
def test_report(cell, is_block):
    """Solved, walked on demand, and fallen back: three different reports, one result."""
    x, r, _ = drawn(cell, is_block, 40, 5, batch=2)
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


@CELLS
def test_newton_corrects_long_memories(cell, is_block, monkeypatch):
    """Gates that keep nearly everything: the first walk is far off, and the scan over the chunks has to mend it."""
    monkeypatch.setattr(newton_module, "TRITON_ROWS", 4)
    x, r, start = drawn(cell, is_block, 64, 3)
    x[:, :, 0] += 4 if cell == "lstm" else -4
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
