"""Cells whose states are no scan: their recurrences written out again, token by token, in plain numbers."""

import math

import pytest
import torch
from torch import nn

from cl.backbones._spec import build_mixer
from cl.core import UserError


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sigmoid(x):
    return 1 / (1 + math.exp(-float(x.detach() if torch.is_tensor(x) else x)))


def run(cell, width=4, num_tokens=6, **options):
    """Inputs (T, gates ...), features (T, F) and the cell, for one row."""
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    cell = build_mixer(f"nonlinear_rnn(cell={cell}({words}), num_heads=2)", width).double().cell
    x = torch.randn(1, num_tokens, width, dtype=torch.float64)
    driven = cell.drive(x).detach()
    h0 = cell.start(torch.zeros(1, *cell.state_shape, dtype=torch.float64))
    y, last = cell.run(driven, h0, None)
    return cell, driven[0], y[0], last[0]


def test_gru_unit_by_unit():
    cell, x, y, _ = run("gru")
    for n in range(4):
        h, (rz, rs, rc) = 0.0, cell.recurrent[:, n].tolist()
        for t in range(6):
            z, s = sigmoid(x[t, 0, n] + rz * h), sigmoid(x[t, 1, n] + rs * h)
            h = (1 - z) * h + z * math.tanh(x[t, 2, n] + rc * s * h)
            assert y[t, n].item() == pytest.approx(h, abs=1e-12)


def test_lstm_unit_by_unit():
    cell, _, _, _ = run("lstm")
    nn.init.normal_(cell.peephole)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    driven = cell.drive(x)
    y, last = cell.run(driven, torch.zeros(1, 2, 4, dtype=torch.float64), None)
    plain = cell.input(x)[0].view(6, 3, 4).detach()
    for n in range(4):
        c = h = 0.0
        (rf, ro, rc), (pf, po) = cell.recurrent[:, n].tolist(), cell.peephole[:, n].tolist()
        for t in range(6):
            f = sigmoid(plain[t, 0, n] + 1 + rf * h + pf * c)
            c = f * c + (1 - f) * math.tanh(plain[t, 2, n] + rc * h)
            h = sigmoid(plain[t, 1, n] + ro * h + po * c) * math.tanh(c)
            assert y[0, t, n].item() == pytest.approx(h, abs=1e-12)
        assert last[0, :, n].tolist() == pytest.approx([c, h], abs=1e-12)


@pytest.mark.parametrize("is_exponential", [False, True])
def test_slstm_without_its_stabiliser(is_exponential):
    """Gates as they are, exponentials and all: small numbers need no scale."""
    cell, x, y, _ = run("slstm", is_exponential=str(is_exponential).lower())
    c, n, h = (torch.zeros(2, 2, dtype=torch.float64) for _ in range(3))
    for t in range(6):
        recurrent = torch.stack([torch.stack([h[i] @ cell.recurrent[g, i] for i in range(2)]) for g in range(4)])
        i, f, z, o = x[t] + recurrent
        f = f.exp() if is_exponential else f.sigmoid()
        c, n = f * c + i.exp() * z.tanh(), f * n + i.exp()
        h = o.sigmoid() * c / n
        torch.testing.assert_close(y[t], h.flatten(), atol=1e-10, rtol=1e-10)


def test_m2rnn_head_by_head():
    cell, x, y, _ = run("m2rnn", key_width=3)
    nn.init.normal_(cell.transition, std=0.5)
    y = cell.run(x[None], torch.zeros(1, 2, 3, 2, dtype=torch.float64), None)[0][0]
    for head in range(2):
        state, w = torch.zeros(3, 2, dtype=torch.float64), cell.transition[head]
        for t in range(6):
            q, k, v, f = x[t, head, :3], x[t, head, 3:6], x[t, head, 6:8], x[t, head, 8]
            state = f * state + (1 - f) * torch.tanh(state @ w + torch.outer(k, v))
            torch.testing.assert_close(y[t, 2 * head : 2 * head + 2], q @ state, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("clip", "truth"), [("none", 5.0), (2.5, 2.5), (10, 5.0)])
def test_m2rnn_clips_the_gradient_of_the_state_in_both_modes(clip, truth):
    """One unit, f = 1: the gradient of S is carried unchanged, so every step adds q dy = 1 and is cut at the bound."""
    cell = build_mixer(f"nonlinear_rnn(cell=m2rnn(clip={clip}), units=1, num_heads=1)", 1).double().cell
    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    for run in (cell.run, cell.walk):
        y, _ = run(torch.ones(1, 5, 1, 4, dtype=torch.float64), start, None)
        assert torch.autograd.grad(y.sum(), start)[0].item() == truth


def test_lem_written_out():
    cell, x, y, _ = run("lem", step_s=0.5)
    z = out = torch.zeros(4, dtype=torch.float64)
    w_d, w_e, w_z = cell.recurrent.weight.chunk(3)
    for t in range(6):
        v_d, v_e, v_z, v_y = x[t].chunk(4)
        d, e = 0.5 * (w_d @ out + v_d).sigmoid(), 0.5 * (w_e @ out + v_e).sigmoid()
        z = (1 - d) * z + d * (w_z @ out + v_z).tanh()
        out = (1 - e) * out + e * (cell.from_z.weight @ z + v_y).tanh()
        torch.testing.assert_close(y[t], out, atol=1e-12, rtol=1e-12)


def test_a_bilinear_unit_counts_parity():
    """A token of 1 swaps the two units, 0 leaves them: no gate and no addition needed, at any length."""
    cell = build_mixer("nonlinear_rnn(cell=bilinear(block=2), units=2)", 1).cell
    with torch.no_grad():
        cell.begin.copy_(torch.tensor([[1.0, 0.0]]))
        cell.input.weight.copy_(torch.tensor([[-1.0], [1.0], [1.0], [-1.0]]))  # identity + x (swap - identity)
    bits = torch.randint(0, 2, (3, 500))
    zeros = torch.zeros(3, 1, 2)
    y, _ = cell.run(cell.drive(bits[..., None].float()), cell.start(zeros), None)
    assert torch.equal(y[..., 1].round().long(), bits.cumsum(1) % 2)


def test_bilinear_documents_start_at_the_learned_state():
    mixer = build_mixer("nonlinear_rnn(cell=bilinear)", 8)
    x, reset = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    reset[1, 3] = True
    torch.testing.assert_close(mixer(x, reset=reset)[0][1, 3:], mixer(x[:, 3:])[0][1])


def test_leaky_tau_by_hand():
    cell = build_mixer("nonlinear_rnn(cell=leaky_tau(shortest=4, longest=4), units=1)", 1).double().cell
    with torch.no_grad():
        cell.input.weight.fill_(1)
        cell.input.bias.fill_(0.5)
        cell.recurrent.fill_(2)
    y, _ = cell.run(cell.drive(torch.tensor([[[1.0], [-1.0]]]).double()), torch.zeros(1, 1).double(), None)
    first = 0.25 * math.tanh(1.5)
    second = 0.75 * first + 0.25 * math.tanh(2 * first - 0.5)
    assert y.flatten().tolist() == pytest.approx([first, second], abs=1e-6)
    assert cell.timescale().item() == pytest.approx(4, abs=1e-6)


def test_time_constants_learn():
    """A target that is the slow average of the input: tau moves to the target's."""
    cell = build_mixer("nonlinear_rnn(cell=leaky_tau(shortest=1.5, longest=1.5), units=1)", 1).cell
    with torch.no_grad():
        cell.input.weight.fill_(1)
        cell.input.bias.fill_(0)
        cell.recurrent.fill_(0)
    x, target, h = torch.randn(16, 40, 1), [], torch.zeros(16, 1)
    for t in range(40):
        h = (1 - 1 / 6) * h + torch.tanh(x[:, t]) / 6
        target.append(h)
    optimizer = torch.optim.Adam(cell.timescale.parameters(), lr=0.2)
    for _ in range(120):
        loss = (cell.run(cell.drive(x), torch.zeros(16, 1), None)[0] - torch.stack(target, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert cell.timescale().item() == pytest.approx(6, abs=0.3)


def test_heads_and_blocks_must_divide_the_units():
    for cell in ("slstm", "m2rnn"):
        with pytest.raises(UserError, match="9 units for 2 heads"):
            build_mixer(f"nonlinear_rnn(cell={cell}, units=9, num_heads=2)", 8)
    with pytest.raises(UserError, match="9 units in blocks of 2"):
        build_mixer("nonlinear_rnn(cell=bilinear(block=2), units=9)", 8)
    with pytest.raises(UserError, match="leaky_tau"):
        build_mixer("nonlinear_rnn(cell=mingru)", 8)


@pytest.mark.parametrize(
    ("cell", "numbers"),
    [
        ("gru", 24),
        ("lstm", 2 * 24),
        ("slstm", 4 * 24),
        ("m2rnn(key_width=5)", 2 * 5 * 12),
        ("lem", 2 * 24),
        ("bilinear(block=6)", 24),
        ("leaky_tau", 24),
    ],
)
def test_states_are_the_formulas(cell, numbers):
    """F = 24, H = 2: numbers of a row's state, however long the text."""
    _, state = build_mixer(f"nonlinear_rnn(cell={cell}, units=24, num_heads=2)", 16)(torch.randn(3, 50, 16))
    assert state["h"].numel() == 3 * numbers
