"""Newton over time: the card's convergence, fall-backs that are counted, and the second oracle of the solved system."""

import kernel_properties as props
import pytest
import torch
from rnn_cases import RNN_CASES

from kernels.newton_rnn import chunked, newton_rnn, newton_rnn_with_report
from kernels.newton_rnn.adjoint import move
from kernels.newton_rnn.cells import GRU, Diagonal, cell_of
from kernels.newton_rnn.layout import Layout


def problem(scale, length=1024, units=256, dtype=torch.float64):
    """The card's: random inputs, recurrent weights uniform in +-scale."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, 3, units, generator=gen, dtype=torch.float64)
    return x.to(dtype), ((2 * torch.rand(3, units, generator=gen, dtype=torch.float64) - 1) * scale).to(dtype)


def after(x, r, count, chunk):
    """Largest error after so many corrections and one more walk, whatever the residual."""
    layout = Layout.of(1, x.shape[1], None, None)
    zero = [torch.zeros_like(x[:, 0, 0])]
    steps = chunked.Steps(x, 0, x.shape[1] // chunk, chunk, layout, zero)
    outs = [torch.empty(1, steps.n, chunk, x.shape[3], dtype=x.dtype) for _ in range(2)]
    chunked._newton(GRU(Diagonal(r)), steps, zero, outs, 0.0, count)
    truth = newton_rnn(x, r, backend="reference")[0]
    return float((outs[0].flatten(1, 2) - truth).abs().max())


# measured for the design, kernels.md section 1e: largest error after Newton iterations 1, 2, 3, 4 (scale: errors)
CARD = {0.5: (1e-1, 3e-3, 2e-6, 3e-13), 1.0: (3e-1, 3e-2, 3e-4, 3e-8)}


@pytest.mark.parametrize("scale", CARD)
def test_newton_over_every_token_converges_as_measured(scale):
    """chunk = 1 is ParaRNN's iteration: its errors are the card's, for its draw of weights and for ours."""
    x, r = problem(scale)
    for count, measured in enumerate(CARD[scale], start=1):
        found = after(x, r, count, 1)
        # the walk after the last correction is one evaluation of the map: it cannot hurt a contraction much
        assert found <= 2 * measured + 1e-14, f"iteration {count}: {found:.1e}, the card has {measured:.0e}"
        if measured > 1e-12:
            assert found >= measured / 300, f"iteration {count}: {found:.1e} is too good, the card has {measured:.0e}"


def test_three_iterations_are_not_always_enough():
    """Scale 2 on the card: 0.8 after three, 2e-7 only after seven; scale 4 never. Chunks converge on both."""
    x, r = problem(2.0)
    assert after(x, r, 3, 1) > 1e-2
    assert after(x, r, 3, 32) < 1e-12
    x, r = problem(4.0)
    assert not after(x, r, 8, 1) < 1e-2
    assert after(x, r, 8, 32) < 1e-10


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_fall_back_is_counted_and_exact(cell):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 3, 8, generator=gen, dtype=torch.float64)
    r = 8 * torch.rand(3, 8, generator=gen, dtype=torch.float64) - 4
    h, last, report = newton_rnn_with_report(x, r, cell=cell, chunk=1, max_iterations=2)
    assert report.sequential.all()
    assert (report.iterations == 2).all()
    assert (report.residual > report.tolerance).all()
    truth, final = newton_rnn(x, r, cell=cell, backend="reference")
    assert props.error(h, truth) < 1e-12
    assert props.error(last, final) < 1e-12


def test_report_of_a_solved_call():
    x, r = problem(0.5, dtype=torch.float32)
    _, _, report = newton_rnn_with_report(x, r, chunk=16)
    assert not report.sequential.any()
    assert ((report.iterations >= 0) & (report.iterations <= 3)).all()
    assert (report.residual <= 1e-6).all()
    assert report.tolerance == 1e-6


def test_blocks_of_time_are_solved_one_after_the_other(monkeypatch):
    monkeypatch.setattr(chunked, "SPAN", 8 * 4)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, 100, 3, 8, generator=gen, dtype=torch.float64)
    r = torch.randn(3, 8, generator=gen, dtype=torch.float64)
    # what is hard in the middle must not cost the rest its convergence
    h, _, report = newton_rnn_with_report(x, r, chunk=4, max_iterations=8)
    assert len(report.iterations) == 7
    assert report.iterations[-1] == -1
    assert not report.sequential[:-1].any()
    assert props.error(h, newton_rnn(x, r, backend="reference")[0]) < 1e-12


@pytest.mark.parametrize("options", [{"max_iterations": 0}, {"chunk": 64}, {}])
def test_walked_token_by_token(options):
    gen = torch.Generator().manual_seed(0)
    wide = not options
    x = torch.randn(2 if wide else 1, 40, 3, chunked.WIDE if wide else 8, generator=gen)
    r = torch.randn(3, x.shape[3], generator=gen)
    h, _, report = newton_rnn_with_report(x, r, **options)
    assert report.iterations.tolist() == [-1]
    assert report.sequential.all()
    assert props.error(h, newton_rnn(x.double(), r.double(), backend="reference")[0]) < 1e-6


@pytest.mark.parametrize("cu", [None, [0, 33, 34, 90]])
def test_backward_of_a_wide_batch_goes_token_by_token(monkeypatch, cu):
    monkeypatch.setattr("kernels.newton_rnn.adjoint.BACK_WIDE", 0)
    monkeypatch.setattr("kernels.newton_rnn.adjoint.BACK_SPAN", 1)
    case = RNN_CASES["newton_lstm"]
    packing = {} if cu is None else {"cu_seqlens": torch.tensor(cu, dtype=torch.int32)}
    props.assert_agrees(case, props.draw(case, 90, "cos 0.5", cu), "chunked", torch.float64, chunk=8, **packing)


def test_not_finite_inputs_stay_local_in_time_and_end():
    x, r = problem(1.0, 200, 4)
    x[0, 100, 2, 1] = float("nan")
    h, last, report = newton_rnn_with_report(x, r, chunk=8)
    assert report.sequential.all()
    assert torch.isfinite(h[:, :100]).all()
    assert torch.isfinite(h[..., [0, 2, 3]]).all()
    assert torch.isnan(last[0, 1])


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_small_states_keep_their_digits(size):
    """An absolute tolerance or a tanh with an absolute error would leave three digits here."""
    gen = torch.Generator().manual_seed(0)
    case = RNN_CASES["newton_gru"]
    x = torch.randn(2, 300, 3, 2, 3, generator=gen, dtype=torch.float64)
    x[:, :, 2] *= size
    inputs = {"x": x, "r": torch.rand(3, 2, 3, generator=gen, dtype=torch.float64) - 0.5}
    props.assert_agrees(case, inputs, "chunked", torch.float32, chunk=16)


@pytest.mark.parametrize("name", ["newton_gru", "newton_lstm", "newton_block_gru", "newton_block_lstm"])
def test_derivatives_of_a_step(name):
    """The tangents that Newton pushes are the Jacobian, and the adjoint is its transpose."""
    inputs = props.draw(RNN_CASES[name], 1, "cos 0.5")
    is_block, cell_name = "block" in name, name.rsplit("_", 1)[1]
    peephole = inputs.get("peephole")
    if not is_block:
        inputs = {n: v.flatten(-2) for n, v in inputs.items()}
        peephole = inputs.get("peephole")
    cell = cell_of(cell_name, inputs["r"], peephole, is_diagonal=not is_block)
    x = [v[:, None] for v in inputs["x"][:, 0].unbind(1)]
    state = inputs["initial_state"]
    parts = [state[:, None]] if cell_name == "gru" else [v[:, None] for v in state.unbind(1)]

    def outs():
        return [torch.empty_like(parts[0]) for _ in range(len(parts) + 1)]

    def step(*values):
        return tuple(v.clone() for v in cell.step(x, list(values), outs()))

    push = cell.push(x, parts, cell.recur.directions(len(parts), parts[0]), outs())[1]
    delta = [torch.randn_like(p) for p in parts]
    small = 1e-6
    plus = step(*(p + small * d for p, d in zip(parts, delta, strict=True)))
    minus = step(*(p - small * d for p, d in zip(parts, delta, strict=True)))
    for moved, a, b in zip(cell.recur.move(push, delta), plus, minus, strict=True):
        assert props.error(moved, (a - b) / (2 * small)) < 1e-8
    kept = outs()
    cell.step(x, parts, kept)
    planes = cell.planes(x, parts, kept)
    adjoint = [torch.randn_like(p) for p in parts]
    reached = cell.reached(planes, adjoint)
    back = cell.back(planes, reached, cell.token(planes, reached))
    left = sum((a * m).sum() for a, m in zip(adjoint, cell.recur.move(push, delta), strict=True))
    right = sum((b * d).sum() for b, d in zip(back, delta, strict=True))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=0)
    if not is_block:
        for moved, b in zip(move(cell.matrix(planes), reached), back, strict=True):
            assert props.error(moved, b) < 1e-12


def test_gru_is_torch_gru_with_the_other_gate():
    """Diagonal weights: torch's GRU with z turned round, r R_n (h) = R_n (r h)."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 3, 5, generator=gen, dtype=torch.float64)
    weights = torch.randn(3, 5, generator=gen, dtype=torch.float64)
    rnn = torch.nn.GRU(15, 5, batch_first=True, dtype=torch.float64, bias=False)
    with torch.no_grad():
        # torch's order is r, z, n, and its z keeps the state
        rnn.weight_hh_l0.copy_(torch.cat([torch.diag(weights[1]), -torch.diag(weights[0]), torch.diag(weights[2])]))
        rnn.weight_ih_l0.copy_(torch.eye(15, dtype=torch.float64))
    rows = torch.cat([x[:, :, 1], -x[:, :, 0], x[:, :, 2]], -1)
    truth, last = rnn(rows)
    h, final = newton_rnn(x, weights, chunk=8)
    assert props.error(h, truth) < 1e-12
    assert props.error(final, last[0]) < 1e-12
